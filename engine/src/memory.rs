//! What the process holds, and what the machine has.

use std::fs;
use std::path::Path;

/// The most memory the process ever held, in bytes (`VmHWM`), where the system tells.
pub fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// The memory the process holds, in bytes (`VmRSS`), where the system tells.
pub fn resident() -> Option<u64> {
    status("VmRSS:")
}

fn status(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Gives memory that the allocator keeps for later back to the system, where that can be asked for.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the call takes no memory and may be made at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Bytes that programs here may hold altogether, where the system tells.
pub fn total() -> Option<u64> {
    let machine = meminfo("MemTotal");
    let container = Container::find().map(|c| c.limit);
    [machine, container].into_iter().flatten().min()
}

/// Bytes that are free for this program, where the system tells: memory that holds nothing but cached files counts.
pub fn available() -> Option<u64> {
    let machine = meminfo("MemAvailable");
    let container = Container::find().map(|c| c.limit.saturating_sub(c.used));
    [machine, container].into_iter().flatten().min()
}

/// The tightest memory limit of the control groups that this process is in.
struct Container {
    limit: u64,
    /// Without files that could be dropped.
    used: u64,
}

impl Container {
    fn find() -> Option<Container> {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let found = groups.lines().filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            match controllers {
                "" => Container::tightest("/sys/fs/cgroup", path, "memory.max", "memory.current"),
                "memory" => Container::tightest(
                    "/sys/fs/cgroup/memory",
                    path,
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                ),
                _ => None,
            }
        });
        found.min_by_key(|c| c.limit)
    }

    /// From the group up to the root; inside a container the root is the group itself.
    fn tightest(root: &str, group: &str, limit: &str, used: &str) -> Option<Container> {
        let root = Path::new(root);
        let folders = Path::new(group.trim_start_matches('/')).ancestors().map(|group| root.join(group));
        let read = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let containers = folders.filter_map(|folder| {
            let limit = read(&folder.join(limit))?;
            let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
            let field = |name: &str| {
                let line = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
                line.trim().parse::<u64>().ok()
            };
            let cached = field("inactive_file").or_else(|| field("total_inactive_file")).unwrap_or(0);
            let used = read(&folder.join(used)).unwrap_or(0).saturating_sub(cached);
            Some(Container { limit, used })
        });
        containers.min_by_key(|c| c.limit)
    }
}

/// A line of `/proc/meminfo`, in bytes.
fn meminfo(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_free_is_part_of_the_whole() {
        let (total, available) = (super::total().expect("known"), super::available().expect("known"));
        assert!(available <= total, "{available} of {total}");
        assert!(total > 64 << 20, "{total}");
    }
}
