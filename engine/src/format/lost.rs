//! A mapped file that is cut short while the program runs.
//!
//! The system answers a read of a page that is gone with SIGBUS. The handler here puts zero pages in the place of what is
//! left of the mapping and remembers that it did; the run notices after the current layer and ends with an error. Signals
//! that concern other memory go to whoever handled them before.

#[cfg(target_os = "linux")]
mod linux {
    use std::sync::Once;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    /// Mappings at a time.
    const SLOTS: usize = 16;

    struct Slot {
        start: AtomicUsize,
        len: AtomicUsize,
        lost: AtomicBool,
    }

    static SLOTS_TABLE: [Slot; SLOTS] = [const {
        Slot { start: AtomicUsize::new(0), len: AtomicUsize::new(0), lost: AtomicBool::new(false) }
    }; SLOTS];

    extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the system passes a valid record to a handler with SA_SIGINFO.
        let address = unsafe { (*info).si_addr() } as usize;
        for slot in &SLOTS_TABLE {
            let (start, len) = (slot.start.load(Ordering::Acquire), slot.len.load(Ordering::Acquire));
            if start == 0 || address < start || address >= start + len {
                continue;
            }
            let page = address & !4095;
            let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: the range is the rest of a mapping that is registered here, so it is replaced, not taken from
            // anybody; mmap may be called in a handler.
            let zeros = unsafe {
                libc::mmap(page as *mut libc::c_void, start + len - page, libc::PROT_READ, flags, -1, 0)
            };
            if zeros != libc::MAP_FAILED {
                slot.lost.store(true, Ordering::Release);
                return;
            }
        }
        // Not ours: the default action, at the return of this handler.
        // SAFETY: resetting a signal is allowed in a handler.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }

    fn install() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            // SAFETY: the record is zeroed plain data, filled in before it is used; the handler only touches atomics and
            // calls functions that are allowed in handlers.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_sigbus as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
                libc::sigemptyset(&mut action.sa_mask);
                libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
            }
        });
    }

    /// A mapping under watch, until it is dropped.
    #[derive(Debug)]
    pub(in crate::format) struct Watch(Option<usize>);

    impl Watch {
        /// Watches `map`, if there is a place for it.
        pub(in crate::format) fn new(map: &[u8]) -> Watch {
            install();
            for (i, slot) in SLOTS_TABLE.iter().enumerate() {
                let start = map.as_ptr() as usize;
                if slot.start.compare_exchange(0, start, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    slot.lost.store(false, Ordering::Release);
                    slot.len.store(map.len().next_multiple_of(4096), Ordering::Release);
                    return Watch(Some(i));
                }
            }
            Watch(None)
        }

        /// Whether pages of the mapping were gone when they were read.
        pub(in crate::format) fn lost(&self) -> bool {
            self.0.is_some_and(|i| SLOTS_TABLE[i].lost.load(Ordering::Acquire))
        }
    }

    impl Drop for Watch {
        fn drop(&mut self) {
            if let Some(i) = self.0 {
                SLOTS_TABLE[i].len.store(0, Ordering::Release);
                SLOTS_TABLE[i].start.store(0, Ordering::Release);
            }
        }
    }
}

#[cfg(target_os = "linux")]
pub(super) use linux::Watch;

/// Elsewhere nothing is watched.
#[cfg(not(target_os = "linux"))]
#[derive(Debug)]
pub(super) struct Watch;

#[cfg(not(target_os = "linux"))]
impl Watch {
    pub(super) fn new(_: &[u8]) -> Watch {
        Watch
    }

    pub(super) fn lost(&self) -> bool {
        false
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_file_cut_short_reads_as_zeros_and_is_noticed() {
        let path = std::env::temp_dir().join(format!("sdfast-lost-{}", std::process::id()));
        std::fs::write(&path, vec![7u8; 5 * 4096]).unwrap();
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let map = super::super::file::map(&file).unwrap();
        let watch = Watch::new(&map);
        assert!(!watch.lost() && map[4 * 4096] == 7);
        file.set_len(4096).unwrap();
        // The bytes have changed behind the compiler's back, and the read must come before the question.
        let byte = std::hint::black_box(std::hint::black_box(&map)[2 * 4096 + 5]);
        assert!(watch.lost() && byte == 0 && map[0] == 7);
        std::fs::remove_file(&path).unwrap();
    }
}
