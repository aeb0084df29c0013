//! What is there in every section: a virtual host, a bucket with images, class vectors in a folder.

use std::path::Path;

use anyhow::{Context, Result};
use lapin::Connection;
use ndarray::Array2;

use angler::app::App;
use angler::builtin_model::{self, BUILTIN};
use angler::config::Settings;
use angler_amqp::topology::Topology;
use angler_core::class_sets::load::version_key;
use angler_vectors::{Contents, file};

use crate::messages;
use crate::photos::{Photos, jpeg_of};
use crate::support::{Broker, Bucket, Setup};

/// Width and height of an image, and what it may have in bytes.
pub const SIZE: (u32, u32) = (240, 180);
const IMAGE_BYTES: usize = 10_000;
/// `set@version` of the class vectors.
pub const CLASSES: &str = "bench@1";
/// Few: scoring has a benchmark of its own.
const LABELS: usize = 10;

pub struct World {
    pub broker: Broker,
    /// Settings and environment of `angler worker`.
    pub setup: Setup,
    /// Of the images.
    pub uris: Vec<String>,
    /// The first image.
    pub image: Vec<u8>,
    /// Of an image, on average.
    pub image_bytes: f64,
    _root: tempfile::TempDir,
}

impl World {
    pub async fn new(images: usize) -> Result<Self> {
        let (broker, bucket, root) =
            (Broker::new().await, Bucket::new().await, tempfile::tempdir()?);
        write_classes(root.path())?;
        let photos = Photos::load()?;
        let (mut uris, mut bytes, mut first) = (Vec::new(), 0, None);
        for n in 0..images {
            let image = jpeg_of(&photos.photo(n, SIZE), IMAGE_BYTES)?;
            bytes += image.len();
            uris.push(bucket.put(&format!("{n:05}.jpg"), image.clone()).await);
            first.get_or_insert(image);
        }
        let mut setup = Setup::worker(&broker, root.path().to_str().context("a path in UTF-8")?);
        setup.set("classes.preload", CLASSES);
        let world = Self {
            broker,
            setup,
            image_bytes: bytes as f64 / uris.len() as f64,
            uris,
            image: first.context("there is no image")?,
            _root: root,
        };
        let app = world.app(&[])?;
        // The queues, before the first worker is there.
        let options = app.settings.amqp_options("bench");
        let connection = angler_amqp::connect(&options, "bench").await?;
        world.topology()?.declare(&connection).await?;
        close(connection).await;
        Ok(world)
    }

    /// The settings of a worker, with changes.
    pub fn flags(&self, changes: &[(&str, &str)]) -> Vec<(String, String)> {
        let mut flags = self.setup.set.clone();
        flags.insert("amqp.url".to_owned(), self.broker.url.clone());
        flags.insert("log.level".to_owned(), "warn".to_owned());
        flags.extend(changes.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        flags.into_iter().collect()
    }

    /// A worker's parts, by the same settings.
    pub fn app(&self, changes: &[(&str, &str)]) -> Result<App> {
        Ok(App::new(Settings::load(None, &self.flags(changes))?))
    }

    pub fn topology(&self) -> Result<Topology> {
        Ok(self.app(&[])?.settings.topology())
    }

    /// The message of job number `n`, with so many images: each job has the next ones.
    pub fn job(&self, n: usize, images: usize) -> Vec<u8> {
        messages::job(&format!("bench/{n}"), CLASSES, self.images(n, images))
    }

    /// A result as such a job has it.
    pub fn result(&self, images: usize) -> Result<Vec<u8>> {
        Ok(messages::result("bench/0", CLASSES, self.images(0, images)).to_json()?)
    }

    fn images(&self, n: usize, images: usize) -> impl Iterator<Item = &str> {
        let first = n * images % self.uris.len();
        self.uris.iter().cycle().skip(first).take(images).map(String::as_str)
    }
}

fn write_classes(root: &Path) -> Result<()> {
    let model = builtin_model::load(BUILTIN)?;
    let mut random = fastrand::Rng::with_seed(1);
    let vectors = Array2::from_shape_simple_fn((LABELS, model.dim), || random.f32() - 0.5);
    let labels = (0..LABELS).map(|n| format!("class-{n:06}")).collect();
    let (set, version) = CLASSES.split_once('@').context("set@version")?;
    let bytes = file::write(&Contents::new(labels, vectors, &model.fingerprint), (set, version))?;
    let path = root.join(version_key(set, version));
    std::fs::create_dir_all(path.parent().context("a folder")?)?;
    Ok(std::fs::write(path, bytes)?)
}

/// Lapin closes channels that were dropped at the same time, and then reports that as an error.
pub async fn close(connection: Connection) {
    let _ = connection.close(200, "done".into()).await;
}
