//! The edge to the system: positioned reads and writes, reserved space, the map.

use std::fs::File;
use std::io;
use std::ops::Range;

/// Maps a whole file for reading.
pub(super) fn map(file: &File) -> io::Result<memmap2::Mmap> {
    // SAFETY: a private, read-only map of a regular file that the writer publishes by rename and never changes
    // afterwards; who truncates it in place takes the mapping away from this process, as with any mapped program file.
    unsafe { memmap2::Mmap::map(file) }
}

/// Asks the system to read `range` of `map` from the disk, without waiting for it.
pub(super) fn prefetch(map: &memmap2::Mmap, range: &Range<usize>) {
    #[cfg(unix)]
    let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len()); // a hint: it may be refused
    #[cfg(not(unix))]
    let _ = (map, range);
}

/// Takes the pages of `range` out of this process's memory; the system may keep them in its cache.
pub(super) fn release(map: &memmap2::Mmap, range: &Range<usize>) {
    #[cfg(unix)]
    // SAFETY: a read-only map of a file: dropped pages come back with the same bytes when they are read again.
    let _ =
        unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
    #[cfg(not(unix))]
    let _ = (map, range);
}

/// Reads `buffer.len()` bytes from `offset`.
#[cfg(unix)]
pub(super) fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

/// Reads `buffer.len()` bytes from `offset`.
#[cfg(windows)]
pub(super) fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

/// Writes all of `bytes` at `offset`.
#[cfg(unix)]
pub(super) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

/// Writes all of `bytes` at `offset`.
#[cfg(windows)]
pub(super) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        bytes = &bytes[n..];
        offset += n as u64;
    }
    Ok(())
}

/// Makes the file `len` bytes of zeros, with the disk space set aside where the system can.
pub(super) fn reserve(file: &File, len: u64) -> io::Result<()> {
    #[cfg(unix)]
    if len > longest_file() {
        // Going on would end the process by a signal.
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    #[cfg(target_os = "linux")]
    if let Ok(signed) = libc::off_t::try_from(len)
        && signed > 0
    {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is open for the length of the call; no memory is handed over.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, signed) } != 0 {
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINTR)) {
                return Err(error);
            }
        }
    }
    file.set_len(len)
}

/// Bytes that a file of this process may have (`ulimit -f`).
#[cfg(unix)]
fn longest_file() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `limit` is a whole `rlimit` that lives through the call, which writes nothing else.
    match unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit) } {
        0 => limit.rlim_cur,
        _ => u64::MAX,
    }
}
