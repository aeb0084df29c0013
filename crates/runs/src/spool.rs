//! The images of a run on disk, in order: counted before the first job is sent, since each job says
//! how many there are, and read again job by job. So memory does not depend on how many there are.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};

use sha2::{Digest, Sha256};

use angler_wire::job::{ImageRef, hex};

/// Images are being written.
pub struct Spool {
    file: BufWriter<File>,
    digest: Sha256,
    images: u64,
    first: Vec<ImageRef>,
}

/// How many images a dry run shows.
const SHOWN: usize = 5;

impl Spool {
    /// A spool in the system's folder for temporary files, which has no name there and goes with
    /// the process.
    ///
    /// # Errors
    /// What the system said.
    pub fn new() -> std::io::Result<Self> {
        let file = BufWriter::with_capacity(1 << 16, tempfile::tempfile()?);
        Ok(Self { file, digest: Sha256::new(), images: 0, first: Vec::new() })
    }

    /// Appends an image.
    ///
    /// # Errors
    /// What the system said: the disk is full.
    pub fn push(&mut self, image: ImageRef) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(&image)?;
        line.push(b'\n');
        self.digest.update(&line);
        self.file.write_all(&line)?;
        self.images += 1;
        if self.first.len() < SHOWN {
            self.first.push(image);
        }
        Ok(())
    }

    /// How many there are so far.
    pub fn images(&self) -> u64 {
        self.images
    }

    /// All are there.
    ///
    /// # Errors
    /// What the system said: the disk is full.
    pub fn finish(self) -> std::io::Result<Images> {
        let mut file = self.file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        file.flush()?;
        Ok(Images {
            file,
            digest: hex(&self.digest.finalize()),
            images: self.images,
            first: self.first,
        })
    }
}

/// The images of a run.
pub struct Images {
    file: File,
    digest: String,
    images: u64,
    first: Vec<ImageRef>,
}

impl Images {
    /// How many there are.
    pub fn len(&self) -> u64 {
        self.images
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.images == 0
    }

    /// SHA-256 over all of them, in hex digits.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The first few.
    pub fn first(&self) -> &[ImageRef] {
        &self.first
    }

    /// The images of the jobs from number `job` on, `per_job` each.
    ///
    /// # Errors
    /// What the system said.
    pub fn jobs_from(&self, job: u64, per_job: usize) -> std::io::Result<Jobs<'_>> {
        (&self.file).seek(SeekFrom::Start(0))?;
        let mut lines = BufReader::with_capacity(1 << 16, &self.file);
        let mut line = Vec::new();
        for _ in 0..job.saturating_mul(per_job as u64).min(self.images) {
            line.clear();
            lines.read_until(b'\n', &mut line)?;
        }
        Ok(Jobs { lines, line, per_job })
    }
}

/// Reads jobs one after the other.
pub struct Jobs<'a> {
    lines: BufReader<&'a File>,
    line: Vec<u8>,
    per_job: usize,
}

impl Iterator for Jobs<'_> {
    type Item = std::io::Result<Vec<ImageRef>>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut images = Vec::with_capacity(self.per_job.min(1024));
        while images.len() < self.per_job {
            self.line.clear();
            match self.lines.read_until(b'\n', &mut self.line) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => return Some(Err(error)),
            }
            match serde_json::from_slice(&self.line) {
                Ok(image) => images.push(image),
                Err(error) => return Some(Err(error.into())),
            }
        }
        (!images.is_empty()).then_some(Ok(images))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(number: usize) -> ImageRef {
        let id = (number % 2 == 1).then(|| format!("sku \"{number}\"\n"));
        ImageRef { uri: format!("s3://photos/ä {number}.jpg"), id }
    }

    fn spool(images: usize) -> Images {
        let mut spool = Spool::new().unwrap();
        (0..images).for_each(|number| spool.push(image(number)).unwrap());
        spool.finish().unwrap()
    }

    #[test]
    fn jobs_are_read_from_any_number_on_and_hold_every_image_once() {
        let images = spool(10);
        assert_eq!((images.len(), images.first().len()), (10, SHOWN));
        for from in [0, 1, 3, 4, 9] {
            let jobs: Vec<Vec<ImageRef>> =
                images.jobs_from(from, 3).unwrap().collect::<Result<_, _>>().unwrap();
            let wanted: Vec<ImageRef> = (from as usize * 3..10).map(image).collect();
            assert_eq!(jobs.concat(), wanted, "from job {from}");
            assert!(jobs.iter().rev().skip(1).all(|job| job.len() == 3));
        }
    }

    #[test]
    fn the_same_images_in_the_same_order_have_the_same_digest() {
        assert_eq!(spool(7).digest(), spool(7).digest());
        assert_ne!(spool(7).digest(), spool(8).digest());
        let mut turned = Spool::new().unwrap();
        [1, 0, 2].into_iter().for_each(|number| turned.push(image(number)).unwrap());
        assert_ne!(turned.finish().unwrap().digest(), spool(3).digest());
    }

    #[test]
    fn no_images_are_no_jobs() {
        let none = spool(0);
        assert!(none.is_empty() && none.jobs_from(0, 3).unwrap().next().is_none());
    }
}
