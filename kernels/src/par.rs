//! The team that shares the work of one operation.

use std::cell::UnsafeCell;

use crate::layout::ALIGN;

/// Bytes of scratch memory each worker owns.
pub const SCRATCH_BYTES: usize = 512 * 1024;

/// One worker's scratch memory, aligned for every instruction set.
#[repr(C, align(64))]
struct Line([u8; ALIGN]);

struct Scratch(UnsafeCell<Box<[Line]>>);

// SAFETY: `Workers::for_each` lends the scratch of index i to the pool thread of index i alone, and that thread runs one
// task at a time.
unsafe impl Sync for Scratch {}

/// A fixed number of threads with scratch memory of their own.
pub struct Workers {
    pool: rayon::ThreadPool,
    scratch: Vec<Scratch>,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workers({})", self.threads())
    }
}

impl Workers {
    /// A team of `threads` (at least one).
    ///
    /// # Panics
    /// Where the system refuses to start a thread.
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("sdfast-{i}"))
            .build()
            .expect("the system starts threads");
        let line = || Line([0; ALIGN]);
        let scratch = (0..threads)
            .map(|_| Scratch(UnsafeCell::new((0..SCRATCH_BYTES / ALIGN).map(|_| line()).collect())))
            .collect();
        Workers { pool, scratch }
    }

    /// How many threads share the work.
    pub fn threads(&self) -> usize {
        self.scratch.len()
    }

    /// Runs `task(i, scratch)` for every `i < tasks`, each once, on whichever worker is free. The scratch memory
    /// ([`SCRATCH_BYTES`], 64-byte aligned) holds whatever an earlier task left there.
    ///
    /// What `task` computes may depend on `i` alone, so that results don't depend on the number of threads.
    pub fn for_each(&self, tasks: usize, task: impl Fn(usize, &mut [u8]) + Sync) {
        use std::sync::atomic::{AtomicUsize, Ordering};
        if tasks == 0 {
            return;
        }
        let next = AtomicUsize::new(0);
        self.pool.broadcast(|worker| {
            // SAFETY: this pool thread is the only one with this index, and tasks do not nest.
            let lines = unsafe { &mut *self.scratch[worker.index()].0.get() };
            let scratch: &mut [u8] =
                // SAFETY: `Line` is plain bytes without padding, so the box is one run of initialized bytes.
                unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), SCRATCH_BYTES) };
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= tasks {
                    break;
                }
                task(i, scratch);
            }
        });
    }
}

/// A slice that tasks of one operation write disjoint parts of.
#[derive(Debug)]
pub struct Shared<'a, T> {
    ptr: *mut T,
    len: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: the parts lent out by `slice` are disjoint (its contract), so threads never share an element.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Lends `data` out in parts.
    pub fn new(data: &'a mut [T]) -> Self {
        Shared { ptr: data.as_mut_ptr(), len: data.len(), life: std::marker::PhantomData }
    }

    /// Asks for the cache lines of elements `start .. start + len`, which are about to be written.
    #[inline(always)]
    pub(crate) fn claim(&self, start: usize, len: usize) {
        #[cfg(target_arch = "x86_64")]
        for byte in (0..len * size_of::<T>()).step_by(64) {
            let line = self.ptr.wrapping_add(start).wrapping_byte_add(byte);
            // SAFETY: a prefetch reads nothing and never faults; where the instruction isn't known it does nothing.
            unsafe {
                std::arch::asm!("prefetchw [{}]", in(reg) line, options(nostack, preserves_flags, readonly))
            };
        }
        let _ = (start, len);
    }

    /// The elements `start .. start + len`.
    ///
    /// # Safety
    /// No two live slices may overlap.
    ///
    /// # Panics
    /// Where the range runs past the end.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "{start} + {len} of {}", self.len);
        // SAFETY: in bounds (checked), and the caller keeps live slices disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(start), len) }
    }
}
