//! Ctrl-C: the first asks the work to stop where nothing is broken, the second ends the program.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use engine::pipeline::Control;

static ASKED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Listens from now on. Where the system has no such signal, nothing happens.
pub(crate) fn install() {
    let _ = ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::Relaxed) {
            std::process::exit(1);
        }
    });
}

/// Whether to go on.
pub(crate) fn control() -> Control {
    if ASKED.load(Ordering::Relaxed) { Control::Stop } else { Control::Continue }
}

/// Becomes true when the work is to stop.
pub(crate) fn flag() -> Arc<AtomicBool> {
    Arc::clone(&ASKED)
}
