//! In a control group with a memory limit: the limit is found, kept, and the picture is the same.
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use common::{command, folder};

/// A control group of its own, gone with the value.
struct Group {
    folder: PathBuf,
    limit: &'static str,
}

impl Group {
    /// One with a limit of `bytes`; `None` where this process may not make any.
    fn new(bytes: u64) -> Option<Group> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let path = |controllers: &str| {
            let fields = |line: &str| line.splitn(3, ':').skip(1).map(str::to_owned).collect::<Vec<_>>();
            let line = own.lines().map(fields).find(|fields| fields[0] == controllers)?;
            Some(line[1].trim_start_matches('/').to_owned())
        };
        let name = format!("sdfast-test-{}", std::process::id());
        let roots = [
            (path("memory"), "/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            (path(""), "/sys/fs/cgroup", "memory.max"),
        ];
        roots.into_iter().find_map(|(path, root, limit)| {
            let folder = Path::new(root).join(path?).join(&name);
            fs::create_dir(&folder).ok()?;
            let group = Group { folder, limit };
            fs::write(group.folder.join(limit), bytes.to_string()).ok()?;
            Some(group)
        })
    }

    fn limit(&self, bytes: u64) {
        fs::write(self.folder.join(self.limit), bytes.to_string()).expect("it has been set before");
    }

    /// `sdfast arguments` in `dir`, in this group.
    fn run(&self, dir: &Path, arguments: &[&str]) -> common::Ran {
        let enter = "echo $$ > \"$0\" && exec \"$@\"";
        let mut shell = command("sh", dir);
        shell.args(["-c", enter]).arg(self.folder.join("cgroup.procs")).arg(env!("CARGO_BIN_EXE_sdfast"));
        shell.args(arguments).output().expect("it starts").into()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A group can go a moment after its last process.
        for _ in 0..100 {
            if fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

#[test]
fn a_limit_is_found_and_kept() {
    let Some(group) = Group::new(1 << 30) else {
        let required = std::env::var("SDFAST_TEST_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|r| r == "cgroup"), "SDFAST_TEST_REQUIRE promises control groups");
        let mut past_the_harness = std::io::stderr().lock();
        writeln!(
            past_the_harness,
            "NOT TESTED: memory limits of containers; no control group can be made here"
        )
        .expect("stderr is there");
        return;
    };
    let dir = folder();
    let dir = dir.path();
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/demo.q8.sdq");
    fs::copy(built_in, dir.join("demo.sdq")).expect("the repository has it");
    let gen_with = |run: &dyn Fn(&[&str]) -> common::Ran, ram: &[&str]| {
        let arguments = ["gen", "a tree", "-m", "demo.sdq", "-W", "384", "-H", "384", "--steps", "2"];
        let rest = ["--seed", "3", "-q", "--json", "-o", "out.png", "--threads", "2"];
        let ran = run(&[&arguments[..], &rest, ram].concat()).done();
        let report: serde_json::Value = serde_json::from_str(&ran.stdout).expect("one object");
        (fs::read(dir.join("out.png")).expect("written"), report["memory"].clone())
    };
    let (free, _) = gen_with(&|arguments| common::sdfast(dir, arguments), &[]);
    let bytes = |memory: &serde_json::Value, key: &str| memory[key].as_u64().expect("a number");
    // Without a budget the limit is the budget, less a margin.
    for limit in [256 << 20, 64 << 20] {
        group.limit(limit);
        let (picture, memory) = gen_with(&|arguments| group.run(dir, arguments), &[]);
        assert!(picture == free, "{limit}");
        let budget = bytes(&memory, "budget_bytes");
        assert!(budget < limit && bytes(&memory, "measured_peak_bytes") <= budget, "{limit}: {memory}");
    }
    // With one it is kept to the byte: in a group of that size nothing is killed.
    let refused =
        group.run(dir, &["gen", "a tree", "-m", "demo.sdq", "-W", "384", "-H", "384", "--ram", "1M"]);
    let (_, least) = refused.stderr.split_once("this picture needs ").expect("a refusal");
    let least: u64 = least.split(' ').next().expect("a number").parse().expect("a number");
    group.limit(least << 20);
    let (picture, memory) =
        gen_with(&|arguments| group.run(dir, arguments), &["--ram", &format!("{least}M")]);
    assert!(picture == free && bytes(&memory, "measured_peak_bytes") <= least << 20, "{memory}");
}
