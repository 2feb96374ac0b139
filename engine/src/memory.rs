//! What the process holds, and what the machine has.

/// A number of kibibytes in `/proc/self/status`, in bytes.
fn status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    kibibytes(&status, key)
}

/// The number behind `key` in text of lines `key: 123 kB`, in bytes.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The most memory the process ever held, in bytes (`VmHWM`), where the system tells.
pub fn peak() -> Option<u64> {
    status("VmHWM")
}

/// The memory the process holds, in bytes (`VmRSS`), where the system tells.
pub fn resident() -> Option<u64> {
    status("VmRSS")
}

/// Gives memory that the allocator keeps for later back to the system, where that can be asked for.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the call takes no memory and may be made at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Bytes that are free for the process, on the machine and in its container (cgroup v1 and v2), where the system tells.
pub fn available() -> Option<u64> {
    let machine = kibibytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Some(
        container(&groups, |path| std::fs::read_to_string(path).ok())
            .map_or(machine, |free| free.min(machine)),
    )
}

/// What the limits of the process's control groups leave, from the lines of `/proc/self/cgroup`; `read` reads a file.
fn container(groups: &str, read: impl Fn(&str) -> Option<String>) -> Option<u64> {
    let number = |path: String| read(&path)?.trim().parse::<u64>().ok(); // "max" is no number
    let mut least: Option<u64> = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let (root, limit, usage) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
            c if c.split(',').any(|c| c == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => continue,
        };
        // A limit of any group above counts too. In a container the group's own path may be missing.
        let mut group = group.trim_end_matches('/');
        loop {
            let at = |file: &str| format!("{root}{group}/{file}");
            if let Some(limit) = number(at(limit)) {
                // Cached file pages are given back when memory is short.
                let stat = read(&at("memory.stat")).unwrap_or_default();
                let cached = |key| {
                    let value = stat.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
                    value.and_then(|v| v.trim().parse::<u64>().ok())
                };
                let cached = cached("total_inactive_file").or(cached("inactive_file")).unwrap_or(0)
                    + cached("total_active_file").or(cached("active_file")).unwrap_or(0);
                let used = number(at(usage)).unwrap_or(0).saturating_sub(cached);
                let free = limit.saturating_sub(used);
                least = Some(least.map_or(free, |l| l.min(free)));
            }
            match group.rfind('/') {
                Some(slash) => group = &group[..slash],
                None => break,
            }
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_both_versions_and_of_groups_above() {
        let v2 = |path: &str| match path {
            "/sys/fs/cgroup/a/b/memory.max" => Some("max\n".into()),
            "/sys/fs/cgroup/a/memory.max" => Some("1000\n".into()),
            "/sys/fs/cgroup/a/memory.current" => Some("700\n".into()),
            "/sys/fs/cgroup/a/memory.stat" => Some("anon 3\nactive_file 100\ninactive_file 200\n".into()),
            _ => None,
        };
        assert_eq!(container("0::/a/b\n", v2), Some(600));
        let v1 = |path: &str| match path {
            "/sys/fs/cgroup/memory/memory.limit_in_bytes" => Some("5000\n".into()),
            "/sys/fs/cgroup/memory/memory.usage_in_bytes" => Some("1000\n".into()),
            _ => None,
        };
        assert_eq!(container("3:cpu:/x\n4:memory,hugetlb:/docker/x\n", v1), Some(4000));
        assert_eq!(container("0::/\n", |_| None), None);
        assert_eq!(container("nonsense", |_| None), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_holds_something_and_the_machine_has_more() {
        let (now, most) = (resident().expect("Linux tells"), peak().expect("Linux tells"));
        assert!(now > 0 && now <= most + (1 << 20) && available().expect("Linux tells") > 0);
        trim();
    }
}
