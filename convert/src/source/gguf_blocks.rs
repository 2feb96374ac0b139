//! GGUF block types.
#![forbid(unsafe_code)]

/// A block type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {}

impl Block {
    pub(crate) fn name(self) -> &'static str {
        match self {}
    }
    pub(crate) fn len(self) -> usize {
        match self {}
    }
    pub(crate) fn bytes(self) -> usize {
        match self {}
    }
    pub(crate) fn to_f32(self, _bytes: &[u8], _out: &mut [f32]) {
        match self {}
    }
}
