//! Jobs made of a list of images: what `angler classify` runs on.

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use angler_wire::error::FatalError;
use angler_wire::job::{ImageRef, Job};

use super::{Delivery, JobSource, Reply, Settle, Settlement, Unsettled};

/// Images in a job. Small enough that results appear soon, large enough that a job costs nothing.
pub const IMAGES_PER_JOB: usize = 32;

/// A list of images, cut into jobs, in order.
pub struct FolderSource {
    template: Job,
    images: std::vec::IntoIter<String>,
    next: u64,
}

impl FolderSource {
    /// Jobs over `images`, which are otherwise as `template` says; they are numbered from 0.
    pub fn new(template: Job, images: Vec<String>) -> Self {
        Self { template, images: images.into_iter(), next: 0 }
    }
}

/// The id of the job of this number.
fn job_id(run: &str, number: u64) -> String {
    format!("{run}/{number:06}")
}

#[async_trait]
impl JobSource for FolderSource {
    async fn receive(&mut self) -> Result<Option<Delivery>, FatalError> {
        let images: Vec<ImageRef> = self
            .images
            .by_ref()
            .take(IMAGES_PER_JOB)
            .map(|uri| ImageRef { uri, id: None })
            .collect();
        if images.is_empty() {
            return Ok(None);
        }
        let mut job = Job { images, ..self.template.clone() };
        job.id = job_id(&self.template.id, self.next);
        if let Some(run) = &mut job.run {
            run.index = self.next;
        }
        self.next += 1;
        Ok(Some(Delivery {
            job: Ok(job),
            queue: "folder".to_owned(),
            attempt: 1,
            suspect: false,
            reply: Reply::default(),
            settle: Box::new(Nothing),
            lost: CancellationToken::new(),
        }))
    }

    async fn stop(&mut self) {
        self.images = Vec::new().into_iter();
    }

    async fn close(&mut self) {}
}

/// A list has nothing to settle: nobody else would take the job.
struct Nothing;

#[async_trait]
impl Settle for Nothing {
    async fn settle(self: Box<Self>, _: Settlement) -> Option<Unsettled> {
        None
    }
}
