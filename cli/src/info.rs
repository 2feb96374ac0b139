//! `sdfast info`

use std::fs::File;
use std::io::Read;

use engine::format;

use crate::args::{Info, Inspect};
use crate::failure::{Failure, Result};
use crate::{inspect, picture, terminal};

/// Larger pictures hold more than one can look at.
const MAX_PICTURE: u64 = 1 << 30;

pub(crate) fn run(arguments: &Info) -> Result<()> {
    let path = &arguments.file;
    let fail = |error: std::io::Error| Failure::io("read", path, &error);
    if path.is_dir() {
        return Err(Failure::new(format!("{} is a folder", path.display()))
            .hint("`sdconv inspect FOLDER` looks at checkpoints"));
    }
    let mut file = File::open(path).map_err(fail)?;
    let mut head = Vec::new();
    (&mut file).take(8).read_to_end(&mut head).map_err(fail)?;
    if head == picture::SIGNATURE {
        let mut bytes = head;
        file.take(MAX_PICTURE).read_to_end(&mut bytes).map_err(fail)?;
        let settings = picture::settings(&bytes)?.ok_or_else(|| {
            Failure::new(format!("{} holds no settings", path.display()))
                .hint("programs that edit pictures often drop them")
        })?;
        terminal::print(&settings);
        return Ok(());
    }
    if head == format::MAGIC {
        return inspect::run(&Inspect { file: path.clone(), json: false });
    }
    Err(Failure::new(format!("{} is neither a PNG picture nor an .sdq model", path.display()))
        .hint("`sdconv inspect FILE` looks at checkpoints"))
}
