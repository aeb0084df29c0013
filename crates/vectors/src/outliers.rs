//! Reference images that look mislabelled.
//!
//! Each image is compared with the centre (the mean direction) of its class *without itself*, since
//! in a small class it would else agree with its own share of the centre, and with the centres of
//! all other classes. Two things are suspicious:
//!
//! * another class's centre is nearer than its own;
//! * it is far below its fellows: its cosine to its own centre is under the class's median −
//!   3 × 1.4826 × MAD, the median absolute deviation scaled to a standard deviation (Iglewicz &
//!   Hoaglin, "How to detect and handle outliers", 1993; the factor 3 as in Leys et al., "Detecting
//!   outliers: Do not use standard deviation around the mean, use absolute deviation around the
//!   median", J. Exp. Soc. Psychol. 49, 2013). A median stays where it is when up to half of the
//!   images are wrong.
//!
//! Both are hints for a person: images at a border between classes show up as well.

use ndarray::{ArrayView2, ArrayViewMut2};
use serde::Serialize;

use super::{ClassVectors, ClassesError, Contents};
use crate::reference_embeddings::Embedded;
use crate::rows::{Precision, Vectors};
use crate::score::Scorer;

/// A class of fewer images has no spread that could be told from chance.
const MIN_IMAGES: usize = 5;

/// Scaled deviations under the median that are far.
const DEVIATIONS: f64 = 3.0;

/// Makes the MAD of a normal distribution its standard deviation.
const SCALE: f64 = 1.4826;

/// A fall below the median that is never far, however alike the others are: copies have no spread
/// at all, and f16 moves a cosine by 1e-4.
const MIN_FALL: f64 = 0.01;

/// Images that are scored at once.
const BATCH: usize = 256;

/// An image that may be in the wrong class.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outlier {
    /// The image.
    pub uri: String,
    /// The class it is in.
    pub label: String,
    /// Cosine to that class's centre, made without it.
    pub own: f32,
    /// The nearest other class; none if there is only one class.
    pub nearest: Option<String>,
    /// Cosine to the nearest other class's centre.
    pub nearest_score: Option<f32>,
    /// What is suspicious.
    pub why: Why,
}

/// What is suspicious about an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// Another class's centre is nearer than its own.
    NearerToAnother,
    /// Its class is the nearest, but its fellows are much nearer to it.
    FarFromItsFellows,
}

/// What was looked at, and what was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Outliers {
    /// The most suspicious first: those nearer to another class by how much, then those far from
    /// their fellows by how much.
    pub found: Vec<Outlier>,
    /// Images that have no fellows to be compared with: they are alone in their class.
    pub alone: usize,
}

/// What is known of one image.
struct Image {
    class: usize,
    row: usize,
    /// Cosine to the centre of its fellows; NaN if they have none.
    own: f64,
    /// Another class, and the cosine to its centre.
    other: Option<(usize, f32)>,
}

/// Compares every kept image with all centres: images × classes × D multiplications, on the
/// scorer's threads. A class whose mean has no direction has no centre to be near to.
///
/// # Errors
/// [`ClassesError`], if the centres are none that can be scored.
pub fn find(embedded: &Embedded, scorer: &Scorer) -> Result<Outliers, ClassesError> {
    let mut images: Vec<Image> = Vec::with_capacity(embedded.images.len());
    for (class, members) in embedded.classes.iter().enumerate() {
        images.extend(members.rows.iter().map(|row| Image {
            class,
            row: *row,
            own: f64::NAN,
            other: None,
        }));
    }
    let (centres, class_of) = centres(embedded)?;
    let mut buffer = vec![0.0; BATCH * embedded.dim];
    for batch in images.chunks_mut(BATCH) {
        let values = &mut buffer[..batch.len() * embedded.dim];
        let shape = (batch.len(), embedded.dim);
        if let Ok(mut rows) = ArrayViewMut2::from_shape(shape, &mut *values) {
            for (image, mut row) in batch.iter_mut().zip(rows.rows_mut()) {
                let Some(row) = row.as_slice_mut() else { continue };
                embedded.vectors.copy_rows(image.row, row);
                image.own = own(&embedded.classes[image.class].sum, row);
            }
        }
        let Ok(rows) = ArrayView2::from_shape(shape, values) else { continue };
        // Its own class is at most one of the best two.
        for (image, top) in batch.iter_mut().zip(centres.score_with(scorer, rows, 2)) {
            let mut best = top.iter().map(|best| (class_of[best.class as usize], best.score));
            image.other = best.find(|(class, _)| *class != image.class);
        }
    }
    let mut suspects: Vec<(Why, f64, &Image)> = Vec::new();
    for members in images.chunk_by(|a, b| a.class == b.class) {
        let far_below = far_below(members.iter().map(|image| image.own));
        suspects.extend(members.iter().filter_map(|image| {
            let nearer = image.other.map(|(_, score)| f64::from(score) - image.own);
            if let Some(by) = nearer.filter(|by| *by > 0.0) {
                return Some((Why::NearerToAnother, by, image));
            }
            let (median, least) = far_below?;
            (image.own < least).then_some((Why::FarFromItsFellows, median - image.own, image))
        }));
    }
    suspects.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    let found = suspects.into_iter().map(|(why, _, image)| Outlier {
        uri: embedded.images[image.row].clone(),
        label: embedded.classes[image.class].label.clone(),
        own: image.own as f32,
        nearest: image.other.map(|(class, _)| embedded.classes[class].label.clone()),
        nearest_score: image.other.map(|(_, score)| score),
        why,
    });
    let alone = embedded.classes.iter().filter(|class| class.rows.len() == 1).count();
    Ok(Outliers { found: found.collect(), alone })
}

/// The centres, and which class each is of.
fn centres(embedded: &Embedded) -> Result<(ClassVectors, Vec<usize>), ClassesError> {
    let classes = embedded.classes.iter().enumerate();
    let means = classes.filter_map(|(class, members)| Some((class, members.mean()?)));
    let mut vectors = Vectors::with_capacity(Precision::F32, embedded.classes.len(), embedded.dim);
    let class_of: Vec<usize> = means
        .map(|(class, mean)| {
            vectors.push(&mean.to_vec());
            class
        })
        .collect();
    let labels = class_of.iter().map(|class| embedded.classes[*class].label.clone()).collect();
    let centres = ClassVectors::new(("centres", "0"), Contents::new(labels, vectors, ""))?;
    Ok((centres, class_of))
}

/// Cosine of an image with the centre of its class without it: with s the class's sum,
/// x·(s − x) / (|x| · |s − x|). NaN if that centre has no direction.
fn own(sum: &[f64], image: &[f32]) -> f64 {
    let (mut product, mut rest, mut length) = (0.0, 0.0, 0.0);
    for (sum, x) in sum.iter().zip(image) {
        let x = f64::from(*x);
        let others = sum - x;
        product += x * others;
        rest += others * others;
        length += x * x;
    }
    // What f16 leaves of an image that is alone is no direction.
    if rest.sqrt() < 1e-2 { f64::NAN } else { product / (rest.sqrt() * length.sqrt()) }
}

/// The median, and what lies far below it; none if there are too few values.
fn far_below(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let mut values: Vec<f64> = values.filter(|value| !value.is_nan()).collect();
    if values.len() < MIN_IMAGES {
        return None;
    }
    let middle = median(&mut values);
    let mut deviations: Vec<f64> = values.iter().map(|value| (value - middle).abs()).collect();
    let fall = DEVIATIONS * SCALE * median(&mut deviations);
    Some((middle, middle - fall.max(MIN_FALL)))
}

/// The median of at least one value.
fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { f64::midpoint(values[half - 1], values[half]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference_embeddings::tests::plane;

    fn found(images: &[(&str, f32)]) -> Vec<(String, Why)> {
        let found = find(&plane(images), &Scorer::default()).unwrap().found;
        found.into_iter().map(|outlier| (outlier.uri, outlier.why)).collect()
    }

    #[test]
    fn an_image_in_the_wrong_class_is_found_with_its_right_one() {
        let images = [("a", 0.0), ("a", 4.0), ("b", 92.0), ("b", 90.0), ("a", 89.0), ("b", 86.0)];
        let outliers = find(&plane(&images), &Scorer::default()).unwrap();
        assert_eq!((outliers.found.len(), outliers.alone), (1, 0));
        let outlier = &outliers.found[0];
        assert_eq!((&*outlier.uri, &*outlier.label), ("a/4.jpg", "a"));
        assert_eq!((outlier.nearest.as_deref(), outlier.why), (Some("b"), Why::NearerToAnother));
        // Without itself: its own centre lies at 2 degrees.
        assert!((outlier.own - 87_f32.to_radians().cos()).abs() < 1e-3, "{outlier:?}");
        assert!(outlier.nearest_score.unwrap() > 0.999);
    }

    #[test]
    fn an_image_far_below_its_fellows_is_found_where_there_are_enough() {
        let class = [("a", 0.0), ("a", 2.0), ("a", 4.0), ("a", 6.0), ("a", 60.0)];
        let far = vec![("a/4.jpg".to_owned(), Why::FarFromItsFellows)];
        assert_eq!(found(&class), far);
        assert_eq!(found(&class[1..]), []);
        // A second class that is farther off changes nothing.
        let mut two = class.to_vec();
        two.extend([("b", 200.0), ("b", 201.0)]);
        assert_eq!(found(&two), far);
    }

    #[test]
    fn the_most_suspicious_comes_first() {
        let mut images = vec![("a", 0.0), ("a", 1.0), ("a", 3.0), ("a", 4.0), ("a", 30.0)];
        images.extend([("b", 90.0), ("b", 91.0), ("b", 93.0), ("b", 2.0), ("b", 40.0)]);
        let uris: Vec<String> = found(&images).into_iter().map(|(uri, _)| uri).collect();
        assert_eq!(uris, ["b/8.jpg", "b/9.jpg", "a/4.jpg"]);
    }

    #[test]
    fn copies_and_small_classes_are_not_suspicious() {
        assert_eq!(found(&[("a", 33.0); 9]), []);
        let nearly = [("a", 33.0), ("a", 33.0), ("a", 33.0), ("a", 33.0), ("a", 34.0)];
        assert_eq!(found(&nearly), []);
        assert_eq!(found(&[("a", 33.0)]), []);
        let alone = find(&plane(&[("a", 0.0), ("b", 1.0)]), &Scorer::default()).unwrap();
        assert_eq!((alone.found.len(), alone.alone), (0, 2));
    }

    #[test]
    fn what_cancels_out_is_let_be() {
        // The mean of `a` has no direction; each of its images has its opposite as its fellow.
        let mut images = plane(&[("a", 0.0), ("a", 90.0), ("b", 50.0)]);
        images.classes[0].sum = vec![0.0, 0.0];
        let outliers = find(&images, &Scorer::default()).unwrap();
        assert!(outliers.found.iter().all(|o| o.nearest.as_deref() == Some("b")), "{outliers:?}");
        // The other two cancel each other out, so the third has nothing to be compared with.
        assert_eq!(
            found(&[("a", 0.0), ("a", 180.0), ("a", 45.0), ("b", 50.0)]),
            [
                ("a/0.jpg".to_owned(), Why::NearerToAnother),
                ("a/1.jpg".to_owned(), Why::NearerToAnother),
            ]
        );
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median(&mut [4.0, 1.0, 3.0]), 3.0);
        assert_eq!(median(&mut [4.0, 1.0, 3.0, 2.0]), 2.5);
    }
}
