//! Reference images as embeddings, by class, and the vectors that stand for each class.
//!
//! A class's mean is summed in f64 while its images arrive. What needs the images themselves (other
//! representatives, the [outliers](super::outliers)) works on embeddings kept as f16: 2 bytes a
//! value, half of what they came in, and an error in a cosine of about 1e-4.

use std::str::FromStr;

use ndarray::{Array1, Array2};

use super::medoids::{MAX_IMAGES, medoids, subsample};
use crate::rows::{Precision, Vectors};
use crate::unit::normalise;

/// A reference image and its class.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reference {
    /// The class.
    pub label: String,
    /// A path or an `s3://` URI.
    pub uri: String,
}

/// Which vectors stand for a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PerClass {
    /// One: the mean of its images, normalised. It is the direction with the largest mean cosine
    /// with them (the spherical mean).
    Mean,
    /// Those of all its images.
    All,
    /// Those of this many representative images, at least one: its [medoids](super::medoids).
    Medoids(usize),
}

/// A text that names no [`PerClass`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} must be mean, all, or medoids:N with N at least 1")]
pub struct PerClassError(String);

impl FromStr for PerClass {
    type Err = PerClassError;

    fn from_str(text: &str) -> Result<Self, PerClassError> {
        let wrong = || PerClassError(text.to_owned());
        match text.split_once(':') {
            None if text == "mean" => Ok(Self::Mean),
            None if text == "all" => Ok(Self::All),
            Some(("medoids", count)) => {
                let count = count.parse().ok().filter(|count| *count > 0);
                count.map(Self::Medoids).ok_or_else(wrong)
            }
            _ => Err(wrong()),
        }
    }
}

/// Reference images that were embedded.
#[derive(Debug)]
pub struct Embedded {
    /// By label; each has at least one image.
    pub classes: Vec<Class>,
    /// The images that were kept, in the order of `images`: [N, D], f16, nearly unit rows.
    pub vectors: Vectors,
    /// URIs of the images that were kept.
    pub images: Vec<String>,
    /// Length of an embedding.
    pub dim: usize,
}

/// One class's images.
#[derive(Debug, Default)]
pub struct Class {
    /// Its name.
    pub label: String,
    /// How many images it has.
    pub count: usize,
    /// The sum of their unit embeddings, `[D]`.
    pub sum: Vec<f64>,
    /// Their rows among those kept; empty if none were kept.
    pub rows: Vec<usize>,
}

impl Class {
    /// Adds an image's unit embedding, `[D]`.
    pub fn add(&mut self, embedding: &[f32]) {
        self.sum.resize(embedding.len(), 0.0);
        for (sum, value) in self.sum.iter_mut().zip(embedding) {
            *sum += f64::from(*value);
        }
        self.count += 1;
    }

    /// The mean, normalised, `[D]`; none if it has no direction.
    pub fn mean(&self) -> Option<Array1<f32>> {
        let mut mean: Array1<f32> =
            self.sum.iter().map(|sum| (sum / self.count as f64) as f32).collect();
        normalise(mean.view_mut()).then_some(mean)
    }
}

/// The vectors of all classes.
#[derive(Debug)]
pub struct Representatives {
    /// One label a row.
    pub labels: Vec<String>,
    /// [rows, D].
    pub vectors: Vectors,
    /// Classes too large for all their images to take part: label, images, how many took part.
    pub sampled: Vec<(String, usize, usize)>,
}

/// The embeddings of this class cancel each other out: their mean has no direction.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the mean of class {0:?} is zero: its images have nothing in common; look at them, or build with other representatives"
)]
pub struct NoDirection(pub String);

impl Embedded {
    /// The mean of each class, [classes, D], unit rows.
    ///
    /// # Errors
    /// [`NoDirection`].
    pub fn means(&self) -> Result<Array2<f32>, NoDirection> {
        let mut means = Array2::zeros((self.classes.len(), self.dim));
        for (mut row, class) in means.rows_mut().into_iter().zip(&self.classes) {
            row.assign(&class.mean().ok_or_else(|| NoDirection(class.label.clone()))?);
        }
        Ok(means)
    }

    /// The vectors that stand for each class, in the order of the labels. All but the mean need
    /// images that were kept.
    ///
    /// # Errors
    /// [`NoDirection`], for the mean.
    pub fn representatives(
        &self,
        per_class: PerClass,
        precision: Precision,
    ) -> Result<Representatives, NoDirection> {
        if per_class == PerClass::Mean {
            let labels = self.classes.iter().map(|class| class.label.clone()).collect();
            let vectors = Vectors::from(self.means()?).to_precision(precision);
            return Ok(Representatives { labels, vectors, sampled: Vec::new() });
        }
        let mut sampled = Vec::new();
        let mut chosen: Vec<(&Class, Vec<usize>)> = Vec::with_capacity(self.classes.len());
        for class in &self.classes {
            let rows = match per_class {
                PerClass::Medoids(wanted) if class.rows.len() > wanted => {
                    let part = subsample(class.rows.len(), MAX_IMAGES);
                    if part.len() < class.rows.len() {
                        sampled.push((class.label.clone(), class.rows.len(), part.len()));
                    }
                    let part: Vec<usize> = part.iter().map(|at| class.rows[*at]).collect();
                    let found = medoids(self.unit_rows(&part).view(), wanted);
                    found.into_iter().map(|at| part[at]).collect()
                }
                _ => class.rows.clone(),
            };
            chosen.push((class, rows));
        }
        let count = chosen.iter().map(|(_, rows)| rows.len()).sum();
        let mut labels = Vec::with_capacity(count);
        let mut vectors = Vectors::with_capacity(precision, count, self.dim);
        let mut buffer = vec![0.0; self.dim];
        for (class, rows) in chosen {
            for row in rows {
                self.vectors.copy_rows(row, &mut buffer);
                vectors.push(&buffer);
                labels.push(class.label.clone());
            }
        }
        Ok(Representatives { labels, vectors, sampled })
    }

    /// Kept embeddings as unit vectors, [rows, D].
    fn unit_rows(&self, rows: &[usize]) -> Array2<f32> {
        let mut matrix = Array2::zeros((rows.len(), self.dim));
        for (mut out, row) in matrix.rows_mut().into_iter().zip(rows) {
            out.assign(&Array1::from(self.vectors.row(*row)));
            // Half precision made it a little longer or shorter; it was a unit vector.
            normalise(out);
        }
        matrix
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Images in a plane: label and angle in degrees.
    pub(crate) fn plane(images: &[(&str, f32)]) -> Embedded {
        let mut embedded = Embedded {
            classes: Vec::new(),
            vectors: Vectors::with_capacity(Precision::F16, images.len(), 2),
            images: Vec::new(),
            dim: 2,
        };
        let mut labels: Vec<&str> = images.iter().map(|(label, _)| *label).collect();
        labels.sort_unstable();
        labels.dedup();
        let class = |label: &&str| Class { label: (*label).to_owned(), ..Class::default() };
        embedded.classes = labels.iter().map(class).collect();
        for (row, (label, degrees)) in images.iter().enumerate() {
            let (sin, cos) = degrees.to_radians().sin_cos();
            let class = &mut embedded.classes[labels.binary_search(label).unwrap()];
            class.add(&[cos, sin]);
            class.rows.push(row);
            embedded.vectors.push(&[cos, sin]);
            embedded.images.push(format!("{label}/{row}.jpg"));
        }
        embedded
    }

    fn angles(vectors: &Vectors) -> Vec<f32> {
        let angle = |row: Vec<f32>| row[1].atan2(row[0]).to_degrees().round();
        (0..vectors.rows()).map(|row| angle(vectors.row(row))).collect()
    }

    #[test]
    fn a_class_is_its_mean_all_of_it_or_its_medoids() {
        let embedded = plane(&[("b", 10.0), ("a", 90.0), ("b", 30.0), ("b", 20.0), ("b", 80.0)]);
        let of = |per_class, precision| embedded.representatives(per_class, precision).unwrap();
        let mean = of(PerClass::Mean, Precision::F32);
        assert_eq!(mean.labels, ["a", "b"]);
        assert_eq!(angles(&mean.vectors), [90.0, 34.0]);
        let all = of(PerClass::All, Precision::F16);
        assert_eq!(all.labels, ["a", "b", "b", "b", "b"]);
        assert_eq!(angles(&all.vectors), [90.0, 10.0, 30.0, 20.0, 80.0]);
        assert_eq!(all.vectors.precision(), Precision::F16);
        let two = of(PerClass::Medoids(2), Precision::F32);
        assert_eq!(two.labels, ["a", "b", "b"]);
        assert_eq!(angles(&two.vectors), [90.0, 20.0, 80.0]);
        assert!(two.sampled.is_empty() && two.vectors.precision() == Precision::F32);
    }

    #[test]
    fn a_class_too_large_for_its_distances_is_sampled_and_that_is_said() {
        let images: Vec<(&str, f32)> =
            (0..MAX_IMAGES + 100).map(|i| ("a", (i % 2 * 90) as f32)).collect();
        let found = plane(&images).representatives(PerClass::Medoids(2), Precision::F32).unwrap();
        assert_eq!(found.sampled, [("a".to_owned(), MAX_IMAGES + 100, MAX_IMAGES)]);
        assert_eq!(angles(&found.vectors), [0.0, 90.0]);
    }

    #[test]
    fn a_mean_without_a_direction_names_its_class() {
        let embedded = plane(&[("a", 0.0), ("a", 90.0), ("b", 45.0)]);
        assert!(embedded.means().is_ok());
        let mut embedded = embedded;
        embedded.classes[0].sum = vec![0.0, 0.0];
        let error = embedded.representatives(PerClass::Mean, Precision::F32).unwrap_err();
        assert!(error.to_string().contains("\"a\""));
        assert!(embedded.representatives(PerClass::All, Precision::F32).is_ok());
    }

    #[test]
    fn per_class_is_read() {
        assert_eq!("mean".parse(), Ok(PerClass::Mean));
        assert_eq!("all".parse(), Ok(PerClass::All));
        assert_eq!("medoids:5".parse(), Ok(PerClass::Medoids(5)));
        for wrong in ["", "medoids", "medoids:", "medoids:0", "medoids:-1", "mean:2", "All"] {
            assert!(
                wrong.parse::<PerClass>().unwrap_err().to_string().contains("medoids:N"),
                "{wrong}"
            );
        }
    }
}
