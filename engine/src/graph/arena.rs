//! One allocation for all activations: every buffer has a fixed place, buffers that live at the same time have different
//! ones.

use std::ops::Range;

use bytemuck::Pod;
use kernels::layout::ALIGN;
use memmap2::MmapMut;

/// A range of the arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// From the start, a multiple of 64.
    pub offset: usize,
    /// Length.
    pub bytes: usize,
}

impl Region {
    /// First byte to one past the last.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.bytes
    }
}

/// A buffer before it has a place: how large, and during which steps (both ends included) it holds something.
#[derive(Clone, Debug)]
pub(super) struct Life {
    pub(super) bytes: usize,
    pub(super) first: usize,
    pub(super) last: usize,
}

/// Places for `lives`, largest first, each at the lowest offset that is free during its life. Returns the places and the
/// size of the whole.
pub(super) fn place(lives: &[Life]) -> (Vec<Region>, usize) {
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lives[i].bytes), i));
    let mut regions = vec![Region::default(); lives.len()];
    let mut placed: Vec<usize> = Vec::with_capacity(lives.len()); // by offset
    let mut total = 0;
    for i in order {
        let life = &lives[i];
        let bytes = life.bytes.next_multiple_of(ALIGN);
        let mut offset = 0;
        for &j in &placed {
            let other = &lives[j];
            if other.last < life.first || life.last < other.first {
                continue;
            }
            let taken = regions[j].offset..regions[j].offset + other.bytes.next_multiple_of(ALIGN);
            if offset + bytes <= taken.start {
                break;
            }
            offset = offset.max(taken.end);
        }
        regions[i] = Region { offset, bytes: life.bytes };
        total = total.max(offset + bytes);
        let at = placed.partition_point(|&j| regions[j].offset <= offset);
        placed.insert(at, i);
    }
    (regions, total)
}

/// The memory that plans are run in.
#[derive(Debug)]
pub struct Arena {
    memory: MmapMut,
    len: usize,
}

impl Arena {
    /// An arena of `bytes`; the system hands out its pages when they are first written.
    pub fn new(bytes: usize) -> std::io::Result<Arena> {
        let memory = MmapMut::map_anon(bytes.max(1))?;
        // Pages of 4 KiB would cost the kernels a table walk every few rows. Where there are no larger ones, so be it.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        Ok(Arena { memory, len: bytes })
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.len
    }

    /// The elements in `region`.
    ///
    /// # Safety
    /// Nothing may write to the region while the slice lives.
    pub(super) unsafe fn slice<T: Pod>(&self, region: Region) -> &[T] {
        assert!(region.offset + region.bytes <= self.len, "{region:?} in an arena of {}", self.len);
        bytemuck::cast_slice(&self.memory[region.range()])
    }

    /// The elements in `region`, to be written.
    ///
    /// # Safety
    /// Nothing else may read or write the region while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn slice_mut<T: Pod>(&self, region: Region) -> &mut [T] {
        assert!(region.offset + region.bytes <= self.len, "{region:?} in an arena of {}", self.len);
        // SAFETY: in bounds (checked) of a private writable mapping that lives as long as `self`, and not aliased: the
        // caller's contract.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(self.memory.as_ptr().cast_mut().add(region.offset), region.bytes)
        };
        bytemuck::cast_slice_mut(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_that_live_together_do_not_overlap() {
        // A small generator is enough: sizes and lives of every relation occur.
        let mut x = 1u64;
        let mut next = |n: u64| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 33) % n
        };
        for _ in 0..50 {
            let lives: Vec<Life> = (0..40)
                .map(|_| {
                    let first = next(30) as usize;
                    Life { bytes: next(1000) as usize, first, last: first + next(8) as usize }
                })
                .collect();
            let (regions, total) = place(&lives);
            for (i, a) in lives.iter().enumerate() {
                assert!(regions[i].range().end <= total && regions[i].offset % ALIGN == 0);
                for (j, b) in lives.iter().enumerate().skip(i + 1) {
                    let together = a.first <= b.last && b.first <= a.last;
                    let (r, s) = (regions[i].range(), regions[j].range());
                    assert!(
                        !together || r.is_empty() || s.is_empty() || r.end <= s.start || s.end <= r.start
                    );
                }
            }
            let floor = (0..40)
                .map(|t| lives.iter().filter(|l| l.first <= t && t <= l.last).map(|l| l.bytes).sum::<usize>())
                .max();
            assert!(total >= floor.unwrap_or(0));
        }
    }
}
