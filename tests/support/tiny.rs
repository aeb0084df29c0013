//! A model that costs nothing, three colours that it tells apart, and images of them.

use std::io::Cursor;

use ndarray::array;

use angler_inference::model::Model;
use angler_vectors::{Contents, file};

use super::Bucket;

/// Its embedding of an image is the image's mean colour.
pub const MODEL: &str = "tests/data/models/tiny-mean";
/// The labels of [`images`], in order.
pub const LABELS: [&str; 3] = ["red", "green", "blue"];

/// The file of a version that holds the three colours.
pub fn version(set: &str, version: &str) -> Vec<u8> {
    let vectors = array![[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];
    let model = Model::load(MODEL).unwrap().fingerprint;
    let contents = Contents::new(LABELS.map(str::to_owned).to_vec(), vectors, &model);
    file::write(&contents, (set, version)).unwrap()
}

/// Uploads an image of each colour; yields their URIs.
pub async fn images(bucket: &Bucket) -> Vec<String> {
    let mut images = Vec::new();
    for (name, colour) in LABELS.iter().zip([[200, 9, 9], [9, 200, 9], [9, 9, 200]]) {
        images.push(bucket.put(&format!("{name}.png"), png(colour)).await);
    }
    images
}

/// An image with some noise, of some kilobytes, so that it comes in more than one piece.
fn png([r, g, b]: [u8; 3]) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    let image = image::RgbImage::from_fn(100, 100, |_, _| {
        let noise = random.u8(0..40);
        image::Rgb([r.saturating_add(noise), g.saturating_add(noise), b.saturating_add(noise)])
    });
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}
