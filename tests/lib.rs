//! Helpers shared by the cross-crate tests, which stand beside this file.
