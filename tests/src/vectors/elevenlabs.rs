//! ElevenLabs.

use super::{number, source_verdict};
use anyhow::Result;
use serde_json::{Value, json};

/// Whether the handler's verdict is the vector's.
pub fn judge(vector: &Value) -> Result<()> {
    source_verdict("elevenlabs", vector, json!({}), number(vector, "now_unix")?.saturating_mul(1000))
}
