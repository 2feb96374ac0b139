//! Checkpoint in, `.sdq` out.
