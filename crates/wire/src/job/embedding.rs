//! An image's embedding as results carry it.

use std::fmt;

use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A normalised embedding, `[D]`. In a result it is base64 (RFC 4648, padded) of little-endian f32,
/// written straight into the message: with a thousand images in a job the text alone would take
/// megabytes beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding(pub Vec<f32>);

impl fmt::Display for Embedding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if cfg!(target_endian = "little") {
            let bytes = bytemuck::cast_slice(&self.0);
            return Base64Display::new(bytes, &STANDARD).fmt(f);
        }
        let bytes: Vec<u8> = self.0.iter().flat_map(|x| x.to_le_bytes()).collect();
        Base64Display::new(&bytes, &STANDARD).fmt(f)
    }
}

impl Serialize for Embedding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Embedding {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let values = decode_embedding(&text);
        values.map(Self).ok_or_else(|| D::Error::custom("an embedding is base64 of f32 values"))
    }
}

/// The values of an [`Embedding`]'s text; none if it is not base64 of whole f32 values.
pub fn decode_embedding(text: &str) -> Option<Vec<f32>> {
    use base64::Engine;
    let bytes = STANDARD.decode(text).ok()?;
    let (values, rest) = bytes.as_chunks::<4>();
    rest.is_empty().then(|| values.iter().map(|v| f32::from_le_bytes(*v)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embeddings_survive_the_wire_exactly() {
        let embedding = Embedding(vec![0.1_f32, -2.5e-20, 1.0, f32::MIN_POSITIVE]);
        let text = embedding.to_string();
        // 1.0 is 00 00 80 3f.
        assert_eq!(Embedding(vec![1.0]).to_string(), "AACAPw==");
        assert_eq!(decode_embedding(&text).unwrap(), embedding.0);
        let json = serde_json::to_string(&embedding).unwrap();
        assert_eq!(json, format!("{text:?}"));
        assert_eq!(serde_json::from_str::<Embedding>(&json).unwrap(), embedding);
        assert_eq!(decode_embedding("AAA="), None);
        assert!(serde_json::from_str::<Embedding>("\"AAA=\"").is_err());
    }
}
