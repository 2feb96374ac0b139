//! Pickles as data. What a pickle would call is only written down; nothing is executed, and a pickle that wants more than
//! a checkpoint needs is turned away.
#![forbid(unsafe_code)]

use std::collections::HashMap;

/// Most values of one pickle; a checkpoint of 5000 tensors has about 200 000.
const MAX_NODES: usize = 8 << 20;

/// A value, by its place on the heap; a flat heap can be dropped however deeply values are nested.
pub(super) type Id = usize;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node {
    /// None, numbers that don't matter, sets, bytes, objects.
    Other,
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// Something that has a name: `torch.HalfStorage`.
    Global(String),
    /// What would be the result of calling the first with the second.
    Call(Id, Id),
    /// Something outside of the pickle, by its name.
    Outside(Id),
}

/// The values of one pickle.
#[derive(Debug)]
pub(super) struct Pickle {
    nodes: Vec<Node>,
    pub(super) top: Id,
    /// Bytes it took.
    pub(super) len: usize,
}

impl Pickle {
    /// Reads the pickle at the front of `bytes`.
    pub(super) fn read(bytes: &[u8]) -> Result<Pickle, String> {
        let mut machine = Machine {
            bytes,
            at: 0,
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        let top = machine.run()?;
        Ok(Pickle { nodes: machine.nodes, top, len: machine.at })
    }

    pub(super) fn get(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// Every value, in the order of the pickle.
    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub(super) fn int(&self, id: Id) -> Option<usize> {
        match self.get(id) {
            Node::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Node::Tuple(items) => Some(items),
            _ => None,
        }
    }

    pub(super) fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Node::Dict(items) => Some(items),
            _ => None,
        }
    }

    /// A tuple of sizes.
    pub(super) fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        match self.get(id) {
            Node::Tuple(items) => items.iter().map(|&i| self.int(i)).collect(),
            // torch.Size((2, 3))
            Node::Call(_, args) => self.sizes(*self.tuple(*args)?.first()?),
            _ => None,
        }
    }
}

/// Whether a checkpoint may name it: what tensors, their containers and the remains of training are made of.
fn is_harmless(module: &str, name: &str) -> bool {
    match module {
        "collections" => matches!(name, "OrderedDict" | "defaultdict"),
        "torch" => {
            let types = ["Size", "device", "dtype"];
            name.ends_with("Storage")
                || types.contains(&name)
                || name.starts_with(|c: char| c.is_ascii_lowercase())
                    && ["float", "half", "double", "bfloat", "int", "uint", "long", "short", "bool"]
                        .iter()
                        .any(|t| name.starts_with(t))
        }
        "torch.storage" => name.ends_with("Storage"),
        "torch._utils" => name.starts_with("_rebuild_"),
        "torch._tensor" => name == "_rebuild_from_type_v2",
        "torch.nn.parameter" => name == "Parameter",
        "numpy" => matches!(name, "dtype" | "ndarray"),
        "numpy.core.multiarray" | "numpy._core.multiarray" => matches!(name, "scalar" | "_reconstruct"),
        "_codecs" => name == "encode",
        "builtins" | "__builtin__" => {
            matches!(
                name,
                "set" | "frozenset" | "dict" | "list" | "tuple" | "int" | "float" | "str" | "bytes" | "long"
            )
        }
        "pathlib" => matches!(name, "PosixPath" | "WindowsPath" | "Path"),
        _ => {
            // Training frameworks leave their callbacks' states behind.
            ["pytorch_lightning.callbacks.", "lightning.pytorch.callbacks.", "omegaconf."]
                .iter()
                .any(|start| module.starts_with(start))
                || module == "pytorch_lightning.utilities.types"
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Heights of the stack at each mark.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id, String> {
        loop {
            let op = self.take(1)?[0];
            if op == b'.' {
                return self.pop();
            }
            self.step(op)?;
        }
    }

    fn step(&mut self, op: u8) -> Result<(), String> {
        match op {
            // protocol, frame
            0x80 => self.take(1).map(drop),
            0x95 => self.take(8).map(drop),
            // the stack
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' if self.marks.last() == Some(&self.stack.len()) => self.pop_mark().map(drop),
            b'0' => self.pop().map(drop),
            b'1' => self.pop_mark().map(drop),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
                Ok(())
            }
            // the memo
            b'q' | b'r' | b'p' | 0x94 => {
                let key = match op {
                    b'q' => u64::from(self.take(1)?[0]),
                    b'r' => self.number(4)?,
                    b'p' => self.line_number()?,
                    _ => self.memo.len() as u64,
                };
                let top = self.top()?;
                self.memo.insert(key, top);
                Ok(())
            }
            b'h' | b'j' | b'g' => {
                let key = match op {
                    b'h' => u64::from(self.take(1)?[0]),
                    b'j' => self.number(4)?,
                    _ => self.line_number()?,
                };
                let id = *self.memo.get(&key).ok_or("a value is used before it is there")?;
                self.stack.push(id);
                Ok(())
            }
            // numbers and the like
            b'N' | 0x88 | 0x89 | 0x8F => self.push(Node::Other),
            b'F' => self.line().map(drop).and_then(|()| self.push(Node::Other)),
            b'G' => self.take(8).map(drop).and_then(|()| self.push(Node::Other)),
            b'K' => self.number(1).and_then(|n| self.push(Node::Int(n as i64))),
            b'M' => self.number(2).and_then(|n| self.push(Node::Int(n as i64))),
            b'J' => self.number(4).and_then(|n| self.push(Node::Int(i64::from(n as u32 as i32)))),
            b'I' | b'L' => {
                let text = self.line()?.trim_end_matches('L').to_owned();
                // I01 and I00 are true and false.
                self.push(text.parse().map_or(Node::Other, Node::Int))
            }
            0x8A | 0x8B => {
                let len = self.number(if op == 0x8A { 1 } else { 4 })? as usize;
                let bytes = self.take(len)?;
                let fits = bytes.len() <= 9;
                let mut value = if bytes.last().is_some_and(|b| b & 0x80 != 0) { -1i128 } else { 0 };
                for byte in bytes.iter().take(9).rev() {
                    value = value << 8 | i128::from(*byte);
                }
                let node = i64::try_from(value).ok().filter(|_| fits).map_or(Node::Other, Node::Int);
                self.push(node)
            }
            // text and bytes
            b'X' | 0x8C | 0x8D | b'T' | b'U' => {
                let len = self.number(match op {
                    b'X' | b'T' => 4,
                    0x8D => 8,
                    _ => 1,
                })?;
                let bytes = self.take(usize::try_from(len).map_err(|_| "a text is too long")?)?;
                let text = String::from_utf8_lossy(bytes).into_owned();
                self.push(Node::Text(text))
            }
            b'V' | b'S' => {
                let text = self.line()?.trim_matches(['\'', '"']).to_owned();
                self.push(Node::Text(text))
            }
            b'B' | b'C' | 0x8E | 0x96 => {
                let len = self.number(match op {
                    b'B' => 4,
                    b'C' => 1,
                    _ => 8,
                })?;
                self.take(usize::try_from(len).map_err(|_| "some bytes are too many")?)?;
                self.push(Node::Other)
            }
            // containers
            b')' => self.push(Node::Tuple(Vec::new())),
            b']' => self.push(Node::List(Vec::new())),
            b'}' => self.push(Node::Dict(Vec::new())),
            b't' => self.pop_mark().and_then(|items| self.push(Node::Tuple(items))),
            b'l' => self.pop_mark().and_then(|items| self.push(Node::List(items))),
            b'd' => self.pop_mark().and_then(|items| self.push(Node::Dict(pairs(&items)))),
            0x91 => self.pop_mark().and_then(|_| self.push(Node::Other)),
            0x85..=0x87 => {
                let start = self.floor(usize::from(op - 0x84))?;
                let items = self.stack.split_off(start);
                self.push(Node::Tuple(items))
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(&[item])
            }
            b'e' | 0x90 => self.pop_mark().and_then(|items| self.extend(&items)),
            b's' => {
                let start = self.floor(2)?;
                let items = self.stack.split_off(start);
                self.update(&items)
            }
            b'u' => self.pop_mark().and_then(|items| self.update(&items)),
            // names and calls
            b'c' => {
                let (module, name) = (self.line()?.to_owned(), self.line()?.to_owned());
                self.global(&module, &name)
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.nodes[module], &self.nodes[name]) {
                    (Node::Text(module), Node::Text(name)) => {
                        let (module, name) = (module.clone(), name.clone());
                        self.global(&module, &name)
                    }
                    _ => Err("a name is no text".into()),
                }
            }
            b'R' | 0x81 => {
                let (args, callable) = (self.pop()?, self.pop()?);
                self.call(callable, args)
            }
            0x92 => {
                let (_, args, callable) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callable, args)
            }
            b'o' => {
                let items = self.pop_mark()?;
                let (&callable, args) = items.split_first().ok_or("a call of nothing")?;
                let args = self.add(Node::Tuple(args.to_vec()))?;
                self.call(callable, args)
            }
            b'i' => {
                let (module, name) = (self.line()?.to_owned(), self.line()?.to_owned());
                let args = self.pop_mark()?;
                self.global(&module, &name)?;
                let callable = self.pop()?;
                let args = self.add(Node::Tuple(args))?;
                self.call(callable, args)
            }
            // the state of an object: of no interest
            b'b' => self.pop().map(drop),
            b'Q' => {
                let name = self.pop()?;
                self.push(Node::Outside(name))
            }
            b'P' => {
                let text = self.line()?.to_owned();
                let name = self.add(Node::Text(text))?;
                self.push(Node::Outside(name))
            }
            _ => Err(format!("it has the unknown instruction {op:#04x}")),
        }
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), String> {
        if !is_harmless(module, name) {
            let wanted: String =
                format!("{module}.{name}").chars().filter(|c| !c.is_control()).take(80).collect();
            return Err(format!("it wants to run {wanted}, which no checkpoint needs"));
        }
        self.push(Node::Global(format!("{module}.{name}")))
    }

    fn call(&mut self, callable: Id, args: Id) -> Result<(), String> {
        let node = match &self.nodes[callable] {
            Node::Global(name) if name.starts_with("collections.") => match self.pairs_of(args) {
                Some(pairs) => Node::Dict(pairs),
                None => Node::Dict(Vec::new()),
            },
            _ => Node::Call(callable, args),
        };
        self.push(node)
    }

    /// The pairs that an `OrderedDict([(key, value), ...])` is made of.
    fn pairs_of(&self, args: Id) -> Option<Vec<(Id, Id)>> {
        let Node::Tuple(args) = &self.nodes[args] else { return None };
        let Node::List(items) = &self.nodes[*args.first()?] else { return None };
        let pair = |&id: &Id| match &self.nodes[id] {
            Node::Tuple(p) | Node::List(p) => Some((*p.first()?, *p.get(1)?)),
            _ => None,
        };
        items.iter().map(pair).collect()
    }

    fn extend(&mut self, items: &[Id]) -> Result<(), String> {
        let top = self.top()?;
        if let Node::List(list) = &mut self.nodes[top] {
            list.extend_from_slice(items);
        }
        Ok(())
    }

    fn update(&mut self, items: &[Id]) -> Result<(), String> {
        let top = self.top()?;
        if let Node::Dict(dict) = &mut self.nodes[top] {
            dict.extend(pairs(items));
        }
        Ok(())
    }

    fn add(&mut self, node: Node) -> Result<Id, String> {
        if self.nodes.len() >= MAX_NODES {
            return Err("it has too many values".into());
        }
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    fn push(&mut self, node: Node) -> Result<(), String> {
        let id = self.add(node)?;
        self.stack.push(id);
        Ok(())
    }

    /// Where the top `count` values begin; they must lie above the last mark.
    fn floor(&self, count: usize) -> Result<usize, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let start = self.stack.len().checked_sub(count).filter(|&start| start >= floor);
        start.ok_or_else(|| "its stack runs empty".into())
    }

    fn top(&self) -> Result<Id, String> {
        Ok(self.stack[self.floor(1)?])
    }

    fn pop(&mut self) -> Result<Id, String> {
        let start = self.floor(1)?;
        Ok(self.stack.split_off(start)[0])
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("its stack has no mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let bytes: &'a [u8] = self.bytes;
        let taken = bytes[self.at..].get(..len).ok_or("it is cut short")?;
        self.at += len;
        Ok(taken)
    }

    fn number(&mut self, len: usize) -> Result<u64, String> {
        Ok(self.take(len)?.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|&b| b == b'\n').ok_or("it is cut short")?;
        let line = self.take(len + 1)?;
        std::str::from_utf8(&line[..len])
            .map(|l| l.trim_end_matches('\r'))
            .map_err(|_| "a name is no text".into())
    }

    fn line_number(&mut self) -> Result<u64, String> {
        self.line()?.parse().map_err(|_| "a place of the memo is no number".into())
    }
}

fn pairs(items: &[Id]) -> Vec<(Id, Id)> {
    items.chunks_exact(2).map(|p| (p[0], p[1])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_run() {
        for bytes in [
            &b"\x80\x02cposix\nsystem\nX\x02\0\0\0ls\x85R."[..],
            b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
            b"(S'ls'\nios\nsystem\n.",
            b"c__builtin__\nexec\n.",
            b"\x80\x02ctorch\nload\n.",
        ] {
            let error = Pickle::read(bytes).unwrap_err();
            assert!(error.contains("wants to run"), "{error}");
        }
    }

    #[test]
    fn values() {
        let pickle =
            Pickle::read(b"\x80\x02}q\x00(X\x01\x00\x00\x00aK\x05X\x01\x00\x00\x00bJ\xff\xff\xff\xffu.")
                .unwrap();
        let dict = pickle.dict(pickle.top).unwrap();
        assert_eq!((pickle.text(dict[0].0), pickle.int(dict[0].1)), (Some("a"), Some(5)));
        assert_eq!((pickle.text(dict[1].0), pickle.get(dict[1].1)), (Some("b"), &Node::Int(-1)));
        let pickle = Pickle::read(b"\x80\x02\x8a\x09\xff\xff\xff\xff\xff\xff\xff\x7f\x00.").unwrap();
        assert_eq!(pickle.get(pickle.top), &Node::Int(i64::MAX));
    }

    #[test]
    fn broken_pickles() {
        for bytes in [
            &b""[..],
            b".",
            b"t.",
            b"\x85.",
            b"h\x00.",
            b"(0",
            b"X\xff\xff\xff\xff.",
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.",
            b"R.",
            b"(K\x01\x86.",
            b"\xfe.",
        ] {
            assert!(Pickle::read(bytes).is_err(), "{bytes:?}");
        }
        // Deep nesting costs no stack.
        let mut deep = b")".to_vec();
        deep.extend(std::iter::repeat_n(0x85, 1_000_000));
        deep.push(b'.');
        Pickle::read(&deep).unwrap();
    }
}
