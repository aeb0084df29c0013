//! The small default model that is compiled into the program, so that `angler classify` needs nothing
//! beside it.

use angler_inference::model::{Model, ModelError};

/// `model.path` of this model.
pub const BUILTIN: &str = "builtin";
const GRAPH: &[u8] = include_bytes!("../models/efficientnet-lite0/model.onnx");
const DESCRIPTION: &str = include_str!("../models/efficientnet-lite0/model.toml");

/// Loads the model that `model.path` names: a folder, or the model in the program if it is
/// [`BUILTIN`].
///
/// # Errors
/// As [`Model::load`].
pub fn load(path: &str) -> Result<Model, ModelError> {
    match path {
        BUILTIN => Model::from_parts(GRAPH, DESCRIPTION, "the built-in model"),
        folder => Model::load(folder),
    }
}
