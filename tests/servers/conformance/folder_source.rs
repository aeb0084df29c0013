//! The list of `angler classify` as a source: the rules that hold for every source, without
//! redelivery, since nobody else would take its jobs.

use angler_core::source::folder::{FolderSource, IMAGES_PER_JOB};
use angler_core::source::{JobSource, Settlement};
use angler_wire::job::{ClassSelector, Job, Run};

fn source(images: usize) -> FolderSource {
    let template = Job {
        id: "classify".into(),
        images: Vec::new(),
        classes: ClassSelector::parse("s@1").unwrap(),
        top_k: 3,
        min_score: Some(0.25),
        embeddings: true,
        run: Some(Run { id: "classify".into(), jobs: 3, index: 0, nonce: None }),
    };
    FolderSource::new(template, (0..images).map(|i| format!("{i}.png")).collect())
}

#[tokio::test]
async fn every_image_comes_once_in_order_in_jobs_with_all_fields() {
    let total = 2 * IMAGES_PER_JOB + 5;
    let mut source = source(total);
    let mut uris = Vec::new();
    let mut number = 0;
    loop {
        // A call that is made and dropped before it is polled loses nothing.
        drop(source.receive());
        let Some(delivery) = source.receive().await.unwrap() else { break };
        let job = delivery.job.unwrap();
        assert_eq!(job.id, format!("classify/{number:06}"));
        assert_eq!(job.run.as_ref().unwrap().index, number);
        assert_eq!((job.top_k, job.min_score, job.embeddings), (3, Some(0.25), true));
        assert_eq!(job.classes.to_string(), "s@1");
        assert_eq!(delivery.attempt, 1);
        assert!(!delivery.lost.is_cancelled());
        uris.extend(job.images.into_iter().map(|image| image.uri));
        delivery.settle.settle(Settlement::Ack).await;
        number += 1;
    }
    assert_eq!(number, 3);
    assert_eq!(uris, (0..total).map(|i| format!("{i}.png")).collect::<Vec<_>>());
    assert!(source.receive().await.unwrap().is_none(), "an end is an end");
}

#[tokio::test]
async fn a_stopped_list_hands_out_no_more() {
    let mut source = source(5 * IMAGES_PER_JOB);
    assert!(source.receive().await.unwrap().is_some());
    source.stop().await;
    assert!(source.receive().await.unwrap().is_none());
    source.close().await;
}

#[tokio::test]
async fn an_empty_list_ends_at_once() {
    assert!(source(0).receive().await.unwrap().is_none());
}
