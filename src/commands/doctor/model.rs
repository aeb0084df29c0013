//! The model's folder.

use std::sync::Arc;

use angler_inference::model::{Model, ModelError};
use angler_wire::text::chain;

use super::report::Check;
use super::within;
use crate::builtin_model::{self, BUILTIN};
use crate::config::Settings;

/// What there is to say of it, and the model if it loads.
pub(super) async fn check(settings: &Settings) -> (Check, Option<Arc<Model>>) {
    let path = settings.model.path.clone();
    let loading = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || builtin_model::load(&path))
    };
    let error = match within(loading).await {
        Ok(Ok(Ok(model))) => return (found(&path, &model), Some(Arc::new(model))),
        Ok(Ok(Err(error))) => error,
        Ok(Err(panic)) => {
            let message = format!("{path}: reading it panicked: {panic}");
            return (Check::problem("model.path", message, DAMAGED), None);
        }
        Err(silent) => {
            let remedy = "Look at the disk that model.path lies on.";
            return (Check::problem("model.path", format!("{path}: {silent}"), remedy), None);
        }
    };
    let remedy = match &error {
        ModelError::Unreadable { .. } => {
            "Correct model.path, or set it to \"builtin\" for the model inside the binary. \
             models/README.md describes the folder."
        }
        ModelError::Description { .. } => "Correct model.toml; models/README.md describes it.",
        ModelError::Graph { .. } => DAMAGED,
        ModelError::Contradiction { .. } => {
            "Correct model.toml to what the graph has; models/README.md describes it."
        }
    };
    (Check::problem("model.path", chain(&error), remedy), None)
}

const DAMAGED: &str = "Copy or export model.onnx anew: as one file, without external data.";

fn found(path: &str, model: &Model) -> Check {
    let place = if path == BUILTIN { "inside the binary" } else { path };
    let batch = match model.fixed_batch {
        Some(fixed) => format!(", batches of {fixed}"),
        None => String::new(),
    };
    Check::ok(
        "model.path",
        format!(
            "{}, {place}: {} × {} pixels to {} values{batch}",
            model.fingerprint, model.pixels.width, model.pixels.height, model.dim
        ),
    )
}
