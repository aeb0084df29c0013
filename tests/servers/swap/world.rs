//! What each test has: a broker, a bucket with images and class sets, a model of three values.

use std::collections::HashMap;
use std::io::Cursor;

use image::{ImageFormat, Rgb, RgbImage};
use lapin::BasicProperties;
use lapin::options::BasicPublishOptions;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use angler_inference::model::Model;

use crate::support::{
    self, Broker, Bucket, Client, Received, Results, Setup, Worker, eventually, http_get,
};

/// Its embedding of an image is the image's mean colour, [red, green, blue].
const MODEL: &str = "tests/data/models/tiny-mean";

/// Whose versions are swapped.
pub const SET: &str = "colours";

pub const RED: [f32; 3] = [1.0, 0.0, 0.0];
pub const GREEN: [f32; 3] = [0.0, 1.0, 0.0];
pub const BLUE: [f32; 3] = [0.0, 0.0, 1.0];

pub struct World {
    pub broker: Broker,
    pub bucket: Bucket,
    pub setup: Setup,
    /// The model's fingerprint.
    pub model: String,
}

/// How a command ended.
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub log: String,
}

impl Ran {
    /// What `--json` printed.
    pub fn json(&self) -> Value {
        let read = serde_json::from_str(&self.out);
        read.unwrap_or_else(|e| panic!("{e}: {}\n{}", self.out, self.log))
    }
}

impl World {
    pub async fn new() -> Self {
        Self::at(Broker::new().await).await
    }

    pub async fn at(broker: Broker) -> Self {
        let bucket = Bucket::new().await;
        let mut setup = Setup::worker(&broker, &format!("s3://{}/classes", bucket.name));
        setup.set("model.path", MODEL);
        let model = Model::load(MODEL).unwrap().fingerprint;
        Self { broker, bucket, setup, model }
    }

    /// A broker of its own over the same bucket: workers that share no jobs with the others.
    pub async fn beside(&self) -> Self {
        let broker = Broker::new().await;
        let mut setup = self.setup.clone();
        setup.env.insert("ANGLER__AMQP__URL".into(), broker.url.clone());
        let bucket = Bucket { name: self.bucket.name.clone(), client: self.bucket.client.clone() };
        Self { broker, bucket, setup, model: self.model.clone() }
    }

    /// An image of one colour; yields its URI.
    pub async fn image(&self, name: &str, colour: [u8; 3]) -> String {
        let mut bytes = Cursor::new(Vec::new());
        let pixels = RgbImage::from_pixel(8, 8, Rgb(colour));
        pixels.write_to(&mut bytes, ImageFormat::Png).unwrap();
        self.bucket.put(&format!("images/{name}.png"), bytes.into_inner()).await
    }

    /// A red, a green and a blue image, none of them purely so.
    pub async fn images(&self) -> Vec<String> {
        vec![
            self.image("red", [220, 30, 20]).await,
            self.image("green", [10, 200, 40]).await,
            self.image("blue", [20, 10, 240]).await,
        ]
    }

    /// A file of this model with these classes.
    pub fn file(&self, classes: &[(&str, [f32; 3])]) -> File {
        File {
            labels: classes.iter().map(|(label, _)| (*label).to_owned()).collect(),
            values: classes.iter().flat_map(|(_, vector)| *vector).collect(),
            dim: 3,
            model: self.model.clone(),
            min_score: None,
        }
    }

    pub async fn put_version(&self, set: &str, version: &str, file: impl Into<Vec<u8>>) {
        self.bucket.put(&format!("classes/{set}/{version}.safetensors"), file).await;
    }

    /// A version of [`SET`] whose labels, `red-1`, say which one it is.
    pub async fn put_colours(&self, version: &str) {
        let labels = ["red", "green", "blue"].map(|colour| format!("{colour}-{version}"));
        let classes = [(&*labels[0], RED), (&*labels[1], GREEN), (&*labels[2], BLUE)];
        self.put_version(SET, version, self.file(&classes)).await;
    }

    /// Writes a set's `active.json` beside the commands: nothing is announced.
    pub async fn put_active(&self, set: &str, body: &str) {
        self.bucket.put(&format!("classes/{set}/active.json"), body).await;
    }

    /// The version that [`SET`]'s `active.json` names, and the whole file.
    pub async fn active(&self) -> (String, Vec<u8>) {
        let key = format!("classes/{SET}/active.json");
        let got = self.bucket.client.get_object().bucket(&self.bucket.name).key(key).send().await;
        let bytes = got.unwrap().body.collect().await.unwrap().to_vec();
        let active: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        (active["version"].as_str().unwrap_or_default().to_owned(), bytes)
    }

    /// Runs a command with this world's settings, beside whatever else the test does.
    pub async fn run(&self, arguments: &[&str]) -> Ran {
        run(&self.setup, arguments).await
    }

    /// Says, as a command does, that a set changed, and waits until one worker has looked; yields
    /// what it serves then.
    pub async fn announce(&self, client: &Client, set: &str) -> Value {
        let replies = support::unique("replies");
        client.private_queue(&replies).await;
        let mut heard = client.consume(&replies).await;
        let request = json!({"kind": "activated", "set": set, "version": "any"}).to_string();
        let properties = BasicProperties::default()
            .with_type("control.v1".into())
            .with_correlation_id("1".into())
            .with_reply_to(replies.as_str().into());
        let options = BasicPublishOptions::default();
        let (exchange, everyone) = ("angler.control".into(), "".into());
        let sent = client.channel.basic_publish(
            exchange,
            everyone,
            options,
            request.as_bytes(),
            properties,
        );
        sent.await.unwrap().await.unwrap();
        loop {
            let reply = heard.next().await.body;
            if reply["answer"] == "serving" {
                return reply["set"].clone();
            }
        }
    }
}

/// Runs a command to its end on a thread of its own.
pub async fn run(setup: &Setup, arguments: &[&str]) -> Ran {
    let setup = setup.clone();
    let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
    let running = tokio::task::spawn_blocking(move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        setup.run(&arguments)
    });
    let (code, out, log) = running.await.unwrap();
    Ran { code, out, log }
}

/// A version's file, as a tool other than angler writes it: nothing is checked, so that it can be
/// wrong.
pub struct File {
    pub labels: Vec<String>,
    /// Row after row of `dim` values.
    pub values: Vec<f32>,
    pub dim: usize,
    pub model: String,
    pub min_score: Option<f32>,
}

impl From<File> for Vec<u8> {
    fn from(file: File) -> Self {
        let mut metadata: HashMap<String, String> = [
            ("format", "angler.class-vectors/1".to_owned()),
            ("labels", json!(file.labels).to_string()),
            ("model", file.model),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        if let Some(min_score) = file.min_score {
            metadata.insert("min_score".to_owned(), min_score.to_string());
        }
        let bytes: Self = file.values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let shape = vec![file.values.len() / file.dim, file.dim];
        let tensor = TensorView::new(Dtype::F32, shape, &bytes).unwrap();
        safetensors::serialize([("vectors", tensor)], Some(metadata)).unwrap()
    }
}

/// What a worker's `/status` says of a set; null: it does not serve it.
pub fn status(worker: &Worker, set: &str) -> Value {
    let (code, body) = http_get(&format!("{}/status", worker.http)).unwrap();
    assert_eq!(code, 200, "{body}");
    let status: Value = serde_json::from_str(&body).unwrap();
    let sets = status["classes"].as_array().unwrap();
    sets.iter().find(|s| s["set"] == set).cloned().unwrap_or_default()
}

/// Waits until a worker serves this version of [`SET`]; yields its status.
pub async fn serves(worker: &Worker, version: &str) -> Value {
    eventually(&format!("{SET}@{version} is served:\n{}", worker.log()), async || {
        let status = status(worker, SET);
        (status["version"] == version).then_some(status)
    })
    .await
}

/// The labels that one job gets.
pub async fn labels(
    client: &Client,
    results: &mut Results,
    images: &[String],
    classes: &str,
) -> Vec<String> {
    let id = support::unique("labels");
    client.job(&json!({"id": id, "images": images, "classes": classes})).await;
    let result = results.next().await;
    assert_eq!(result.body["id"], *id);
    labels_of(&result)
}

/// The labels of a result that must be done.
pub fn labels_of(result: &Received) -> Vec<String> {
    assert_eq!(result.body["status"], "done", "{}", result.body);
    let images = result.body["images"].as_array().unwrap().iter();
    images.map(|entry| entry["label"].as_str().unwrap_or("unknown").to_owned()).collect()
}

/// What the images of [`World::images`] are in a version of [`World::put_colours`].
pub fn colours(version: &str) -> Vec<String> {
    ["red", "green", "blue"].map(|colour| format!("{colour}-{version}")).into()
}
