//! The team that shares the work of one operation.
//!
//! Thousands of operations a second, each some microseconds to milliseconds long, are too many for threads that go to sleep
//! in between: a worker spins for a moment before it parks, and the thread that calls is a worker too. It opens a job,
//! whoever is awake joins, and when the tasks run out it closes the job and waits for those who joined, not for sleepers.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::layout::ALIGN;

/// Bytes of scratch memory each worker owns.
pub const SCRATCH_BYTES: usize = 512 * 1024;

/// Spins before a worker parks: some tens of microseconds.
const SPINS: usize = 1000;

/// A line of a worker's scratch memory, aligned for every instruction set.
#[repr(C, align(64))]
struct Line([u8; ALIGN]);

struct Scratch(UnsafeCell<Box<[Line]>>);

// SAFETY: only the worker of index i touches the scratch of index i (`Workers::for_each`), one task at a time.
unsafe impl Sync for Scratch {}

/// What every worker of a job runs, with its index. The pointer is good while the job is open or has members.
type Body = *const (dyn Fn(usize) + Sync);

/// The job at hand: an epoch (32 bits), whether it is open, and how many helpers are in it.
struct State(AtomicU64);

const OPEN: u64 = 1 << 31;
const MEMBERS: u64 = OPEN - 1;
const EPOCH: u64 = 1 << 32;

impl State {
    /// The epoch of an open job after `seen`.
    fn open_after(&self, seen: u64) -> Option<u64> {
        let state = self.0.load(Ordering::SeqCst);
        let epoch = state / EPOCH;
        (state & OPEN != 0 && epoch != seen).then_some(epoch)
    }

    /// Enters the open job of `epoch`, unless it has been closed.
    fn join(&self, epoch: u64) -> bool {
        let enter = |state: u64| (state & OPEN != 0 && state / EPOCH == epoch).then_some(state + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, enter).is_ok()
    }

    fn leave(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }

    /// Opens the next job. The last one is closed and left.
    fn open(&self) {
        let state = self.0.load(Ordering::Relaxed);
        self.0.store((state / EPOCH + 1).wrapping_mul(EPOCH) | OPEN, Ordering::SeqCst);
    }

    /// Closes the job and waits until all members have left.
    fn close(&self) {
        self.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.0.load(Ordering::Acquire) & MEMBERS != 0 {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// What the caller and its helpers share.
struct Team {
    state: State,
    body: UnsafeCell<Option<Body>>,
    /// What a helper's task panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// How many helpers are parked or about to be.
    sleepers: AtomicUsize,
    /// Whether the team is dismissed.
    dismissed: Mutex<bool>,
    wake: Condvar,
}

// SAFETY: `body` is written by the caller while no job is open or has members, and read by members only.
unsafe impl Sync for Team {}
// SAFETY: as above; the pointer is never followed outside a job.
unsafe impl Send for Team {}

impl Team {
    /// The life of the helper of index `worker`.
    fn help(&self, worker: usize) {
        let mut seen = 0;
        while let Some(epoch) = self.next(seen) {
            seen = epoch;
            if !self.state.join(epoch) {
                continue;
            }
            // SAFETY: this helper is a member, so the caller keeps the body until it leaves.
            let run = AssertUnwindSafe(|| unsafe {
                (*(*self.body.get()).expect("an open job has a body"))(worker)
            });
            if let Err(panic) = catch_unwind(run) {
                *lock(&self.panic) = Some(panic);
            }
            self.state.leave();
        }
    }

    /// Waits for a job after `seen`; none when the team is dismissed.
    fn next(&self, seen: u64) -> Option<u64> {
        for _ in 0..SPINS {
            if let Some(epoch) = self.state.open_after(seen) {
                return Some(epoch);
            }
            std::hint::spin_loop();
        }
        let mut dismissed = lock(&self.dismissed);
        // Counted before the last look: a caller that opens a job after it sees the sleeper.
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let epoch = loop {
            if *dismissed {
                break None;
            }
            if let Some(epoch) = self.state.open_after(seen) {
                break Some(epoch);
            }
            dismissed = self.wake.wait(dismissed).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        epoch
    }

    /// Runs `body` on this thread as worker 0 and on every helper that joins in time.
    fn run(&self, body: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes. The job is closed and left before this function returns, also by a panic.
        let erased = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Body>(body) };
        // SAFETY: no job is open and none has members: the caller holds the team's lock, and the last job was closed.
        unsafe { *self.body.get() = Some(erased) };
        self.state.open();
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            // Under the lock, so that no helper is between its last look and its sleep.
            let _dismissed = lock(&self.dismissed);
            self.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| body(0)));
        self.state.close();
        let helper = lock(&self.panic).take();
        if let Some(panic) = own.err().or(helper) {
            resume_unwind(panic);
        }
    }
}

/// Locks; a panic elsewhere leaves nothing half done in what these locks guard.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The next task of a worker's share, on a line of its own.
#[repr(align(64))]
struct Next(AtomicUsize);

/// A fixed number of threads with scratch memory of their own. The thread that calls is one of them.
pub struct Workers {
    team: Arc<Team>,
    helpers: Vec<JoinHandle<()>>,
    scratch: Vec<Scratch>,
    next: Vec<Next>,
    /// Held during an operation.
    busy: Mutex<()>,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workers({})", self.threads())
    }
}

impl Workers {
    /// A team of `threads` (at least one), of which the calling thread is one.
    ///
    /// # Panics
    /// Where the system refuses to start a thread.
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let team = Arc::new(Team {
            state: State(AtomicU64::new(0)),
            body: UnsafeCell::new(None),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            dismissed: Mutex::new(false),
            wake: Condvar::new(),
        });
        let start = |worker: usize| {
            let team = team.clone();
            let builder = std::thread::Builder::new().name(format!("sdfast-{worker}"));
            builder.spawn(move || team.help(worker)).expect("the system starts threads")
        };
        let helpers = (1..threads).map(start).collect();
        let lines = || (0..SCRATCH_BYTES / ALIGN).map(|_| Line([0; ALIGN])).collect();
        let scratch = (0..threads).map(|_| Scratch(UnsafeCell::new(lines()))).collect();
        let next = (0..threads).map(|_| Next(AtomicUsize::new(0))).collect();
        Workers { team, helpers, scratch, next, busy: Mutex::new(()) }
    }

    /// How many threads share the work.
    pub fn threads(&self) -> usize {
        self.scratch.len()
    }

    /// Runs `task(i, scratch)` for every `i < tasks`, each once. Each worker begins with a share of its own, tasks that follow one
    /// another, so that it finds in its cache what it wrote in the last operation there; then it helps the others. The scratch
    /// memory ([`SCRATCH_BYTES`], 64-byte aligned) holds whatever an earlier task left there.
    ///
    /// What `task` computes may depend on `i` alone, so that results don't depend on the number of threads. A task can't
    /// start another operation of its own team: that would wait for itself.
    ///
    /// # Panics
    /// Where a task panics, after all others have ended.
    pub fn for_each(&self, tasks: usize, task: impl Fn(usize, &mut [u8]) + Sync) {
        if tasks == 0 {
            return;
        }
        let _busy = lock(&self.busy);
        let threads = self.threads();
        let first = |share: usize| share * tasks / threads;
        for (share, next) in self.next.iter().enumerate() {
            next.0.store(first(share), Ordering::Relaxed);
        }
        let body = |worker: usize| {
            // SAFETY: one thread at a time is the worker of this index: helper threads have an index each, and worker 0 is
            // the caller, which holds the lock.
            let lines = unsafe { &mut *self.scratch[worker].0.get() };
            let scratch: &mut [u8] =
                // SAFETY: `Line` is plain bytes without padding, so the box is one run of initialized bytes.
                unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), SCRATCH_BYTES) };
            for share in (worker..threads).chain(0..worker) {
                loop {
                    let i = self.next[share].0.fetch_add(1, Ordering::Relaxed);
                    if i >= first(share + 1) {
                        break;
                    }
                    task(i, scratch);
                }
            }
        };
        if tasks == 1 || self.helpers.is_empty() {
            body(0);
        } else {
            self.team.run(&body);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        *lock(&self.team.dismissed) = true;
        self.team.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper catches the panics of tasks and has none of its own.
            let _ = helper.join();
        }
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

    /// Where element `start` lies, to be looked at by nobody.
    #[inline(always)]
    pub(crate) fn address(&self, start: usize) -> *const u8 {
        self.ptr.wrapping_add(start).cast_const().cast()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let workers = Workers::new(threads);
            for tasks in [0, 1, 2, 3, 100] {
                for _ in 0..50 {
                    let mut counts = vec![0u8; tasks];
                    let shared = Shared::new(&mut counts);
                    // SAFETY: each task takes an element of its own.
                    workers.for_each(tasks, |i, _| unsafe { shared.slice(i, 1) }[0] += 1);
                    assert!(counts.iter().all(|&n| n == 1), "{threads} threads, {tasks} tasks: {counts:?}");
                }
            }
        }
    }

    #[test]
    fn parked_helpers_wake_up() {
        let workers = Workers::new(2);
        while workers.team.sleepers.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let names = Mutex::new(std::collections::HashSet::new());
        workers.for_each(2, |_, _| {
            names.lock().unwrap().insert(std::thread::current().id());
            // Whoever comes first waits for the other.
            while names.lock().unwrap().len() < 2 {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_lives_on() {
        let workers = Workers::new(3);
        for bad in [0, 5, 9] {
            let run = || workers.for_each(10, |i, _| assert!(i != bad, "task {bad}"));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
        let sum = AtomicUsize::new(0);
        workers.for_each(10, |i, _| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn callers_take_turns() {
        let workers = Workers::new(2);
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        workers.for_each(4, |_, scratch| {
                            assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
                            scratch.fill(1);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
    }
}
