//! PyTorch's checkpoints: a pickle of tensors, whose numbers lie beside it in a zip or behind it in one stream.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::pickle::{Id, Node, Pickle};
use super::{OpenFile, RawTensor, zip};
use crate::dtype::Dtype;
use crate::error::Error;

/// Longest pickle; those of the largest checkpoints have a few megabytes.
const MAX_PICKLE: u64 = 64 << 20;
/// Keys under which training programs keep the weights, by preference.
const WRAPPERS: [&str; 4] = ["state_dict", "model", "module", "model_state_dict"];

type Tensors = Vec<(String, RawTensor)>;

/// A zip with `NAME/data.pkl` and `NAME/data/KEY`.
pub(super) fn read_zip(file: &OpenFile) -> Result<Tensors, Error> {
    let broken = |fault: String| Error::broken(&file.path, fault);
    let members = zip::members(file)?;
    let not_torch =
        || Error::NotACheckpoint { path: file.path.clone(), why: "it is a zip without a pickle".into() };
    let (name, member) = members.iter().find(|(n, _)| n.ends_with("data.pkl")).ok_or_else(not_torch)?;
    let root = name.strip_suffix("data.pkl").unwrap_or_default();
    if members.contains_key(&format!("{root}constants.pkl")) {
        let what = String::from("it is a TorchScript program");
        return Err(Error::Unsupported { path: file.path.clone(), what });
    }
    if let Some(order) = members.get(&format!("{root}byteorder"))
        && file.bytes_at(order.offset, order.len, "its byte order")? == b"big"
    {
        return Err(broken("its numbers are big-endian".into()));
    }
    if member.len > MAX_PICKLE {
        return Err(broken(format!("its pickle has {} bytes", member.len)));
    }
    let bytes = file.bytes_at(member.offset, member.len, "its pickle")?;
    let pickle = Pickle::read(&bytes).map_err(|e| broken(format!("its pickle: {e}")))?;
    let find = |storage: &Storage| {
        let member = members.get(&format!("{root}data/{}", storage.key));
        member.map(|m| (m.offset, m.len)).ok_or_else(|| format!("has no numbers ({})", storage.key))
    };
    tensors(&pickle, find).map_err(broken)
}

/// Four pickles (magic number, protocol, system, checkpoint), the keys of the storages, and each storage: its length and
/// its numbers.
pub(super) fn read_legacy(file: &OpenFile) -> Result<Tensors, Error> {
    let broken = |fault: String| Error::broken(&file.path, fault);
    let head = file.bytes_at(0, file.len.min(MAX_PICKLE), "its pickle")?;
    let mut at = 0;
    let mut next = || {
        let pickle = Pickle::read(&head[at..]).map_err(|e| broken(format!("its pickle: {e}")))?;
        at += pickle.len;
        Ok::<Pickle, Error>(pickle)
    };
    let (_magic, _protocol, _system) = (next()?, next()?, next()?);
    let (pickle, keys) = (next()?, next()?);
    let types: HashMap<&str, Dtype> = (0..pickle.nodes().len())
        .filter_map(|id| Storage::of(&pickle, id, None).ok())
        .map(|storage| (storage.key, storage.dtype))
        .collect();
    let Node::List(list) = keys.get(keys.top) else {
        return Err(broken("its storages have no keys".into()));
    };
    let mut places = HashMap::new();
    let mut at = at as u64;
    for key in list {
        let key = keys.text(*key).ok_or_else(|| broken("a storage has no key".into()))?;
        let dtype = types.get(key).ok_or_else(|| broken(format!("the storage {key} has no type")))?;
        let count = file.bytes_at(at, 8, "the length of a storage")?;
        let count = u64::from_le_bytes(count.try_into().expect("eight bytes"));
        let bytes = usize::try_from(count).ok().and_then(|count| dtype.bytes(count));
        let end = bytes.and_then(|bytes| (at + 8).checked_add(bytes)).filter(|&end| end <= file.len);
        let end = end.ok_or_else(|| broken(format!("the storage {key} reaches past the end of the file")))?;
        places.insert(key, (at + 8, end - at - 8));
        at = end;
    }
    let find = |storage: &Storage| {
        places.get(storage.key).copied().ok_or_else(|| format!("has no numbers ({})", storage.key))
    };
    tensors(&pickle, find).map_err(broken)
}

/// The tensors of the checkpoint; `find` tells where a storage's bytes lie and how many there are.
fn tensors(
    pickle: &Pickle,
    find: impl Fn(&Storage) -> Result<(u64, u64), String>,
) -> Result<Tensors, String> {
    let mut dict = pickle.dict(pickle.top).ok_or("its pickle holds no dictionary of tensors")?;
    let inside = WRAPPERS.iter().find_map(|wrapper| {
        let (_, value) = dict.iter().find(|(key, _)| pickle.text(*key) == Some(wrapper))?;
        pickle.dict(*value)
    });
    dict = inside.unwrap_or(dict);
    // A name that is set twice has its last value.
    let mut tensors: HashMap<String, RawTensor> = HashMap::new();
    add(pickle, dict, "", &find, &mut tensors)?;
    if tensors.is_empty() {
        // Files beside a model keep their tensors one level deeper.
        for &(key, value) in dict {
            if let (Some(name), Some(inner)) = (pickle.text(key), pickle.dict(value)) {
                add(pickle, inner, &format!("{name}."), &find, &mut tensors)?;
            }
        }
    }
    Ok(tensors.into_iter().collect())
}

/// Adds the tensors of a dictionary.
fn add(
    pickle: &Pickle,
    dict: &[(Id, Id)],
    prefix: &str,
    find: &impl Fn(&Storage) -> Result<(u64, u64), String>,
    tensors: &mut HashMap<String, RawTensor>,
) -> Result<(), String> {
    for &(key, value) in dict {
        let Some(name) = pickle.text(key) else { continue };
        if let Some(tensor) = tensor(pickle, value, find).map_err(|e| format!("tensor {name} {e}"))? {
            tensors.insert(format!("{prefix}{name}"), tensor);
        }
    }
    Ok(())
}

/// `None` where the value is no tensor.
fn tensor(
    pickle: &Pickle,
    id: Id,
    find: &impl Fn(&Storage) -> Result<(u64, u64), String>,
) -> Result<Option<RawTensor>, String> {
    let Node::Call(callable, args) = pickle.get(id) else { return Ok(None) };
    let (Node::Global(name), Some(args)) = (pickle.get(*callable), pickle.tuple(*args)) else {
        return Ok(None);
    };
    let mut named = None; // the type, where it isn't the storage's
    let args = match name.as_str() {
        "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" => args,
        "torch._utils._rebuild_tensor_v3" => {
            let &[.., dtype] = args.get(..7).ok_or("is built in an unknown way")? else { return Ok(None) };
            let Node::Global(dtype) = pickle.get(dtype) else {
                return Err("is built in an unknown way".into());
            };
            named = Some(dtype.as_str());
            args
        }
        // A parameter is a tensor and flags; one of a subclass is the function, the class and its arguments. Neither
        // holds another of its kind.
        "torch._utils._rebuild_parameter" | "torch._tensor._rebuild_from_type_v2" => {
            let inner = match args {
                [_, _, inner, ..] if name.contains("from_type") => pickle.tuple(*inner),
                [inner, ..] => match pickle.get(*inner) {
                    Node::Call(_, args) => pickle.tuple(*args),
                    _ => None,
                },
                [] => None,
            };
            inner.ok_or("is built in an unknown way")?
        }
        _ => return Ok(None),
    };
    let [storage, start, shape, strides, ..] = args else { return Err("is built in an unknown way".into()) };
    let storage = Storage::of(pickle, *storage, named)?;
    let unreadable = || String::from("has no shape");
    let (start, shape) = (pickle.int(*start), pickle.sizes(*shape).ok_or_else(unreadable)?);
    let strides = pickle.sizes(*strides).filter(|s| s.len() == shape.len()).ok_or_else(unreadable)?;
    let start = start.and_then(|start| start.checked_add(storage.start)).ok_or_else(unreadable)?;
    let (offset, bytes) = find(&storage)?;

    let empty = shape.contains(&0);
    let mut expected = 1usize;
    let mut contiguous = true;
    let mut last = 0usize; // of the numbers that the shape reaches
    for (&n, &stride) in shape.iter().zip(&strides).rev() {
        contiguous &= n == 1 || stride == expected;
        expected = expected.checked_mul(n.max(1)).ok_or_else(unreadable)?;
        let reach = n.saturating_sub(1).checked_mul(stride).and_then(|reach| last.checked_add(reach));
        last = reach.ok_or_else(unreadable)?;
    }
    let end = start.checked_add(last).and_then(|end| end.checked_add(usize::from(!empty)));
    let fits = end.and_then(|end| storage.dtype.bytes(end)).is_some_and(|end| end <= bytes);
    let first = storage.dtype.bytes(start).and_then(|first| offset.checked_add(first));
    let (true, Some(offset)) = (fits, first) else {
        return Err(format!("of {shape:?} lies outside its storage of {bytes} bytes"));
    };
    let strides = (!contiguous && !empty).then_some(strides);
    Ok(Some(RawTensor { shape, dtype: storage.dtype, file: 0, offset, strides }))
}

/// Numbers outside of the pickle: `('storage', torch.HalfStorage, key, device, count, view)`.
struct Storage<'a> {
    dtype: Dtype,
    key: &'a str,
    /// First number, where the storage is part of another one.
    start: usize,
}

impl<'a> Storage<'a> {
    /// `named` is the type of the numbers, where the storage's class doesn't tell it.
    fn of(pickle: &'a Pickle, id: Id, named: Option<&str>) -> Result<Storage<'a>, String> {
        let unknown = || String::from("has a storage of an unknown kind");
        let Node::Outside(name) = pickle.get(id) else { return Err(unknown()) };
        let [kind, class, key, _device, _count, view @ ..] = pickle.tuple(*name).ok_or_else(unknown)? else {
            return Err(unknown());
        };
        let (Some("storage"), Node::Global(class)) = (pickle.text(*kind), pickle.get(*class)) else {
            return Err(unknown());
        };
        let start = match view.first().and_then(|view| pickle.tuple(*view)) {
            Some([_key, start, _len]) => pickle.int(*start).ok_or_else(unknown)?,
            _ => 0,
        };
        let class = named.unwrap_or(class);
        let dtype = dtype(class).ok_or_else(|| format!("has numbers of the unknown type {class}"))?;
        Ok(Storage { dtype, key: pickle.text(*key).ok_or_else(unknown)?, start })
    }
}

fn dtype(class: &str) -> Option<Dtype> {
    Some(match class.rsplit('.').next()? {
        "DoubleStorage" | "float64" => Dtype::F64,
        "FloatStorage" | "float32" => Dtype::F32,
        "HalfStorage" | "float16" => Dtype::F16,
        "BFloat16Storage" | "bfloat16" => Dtype::Bf16,
        "float8_e4m3fn" => Dtype::F8E4M3,
        "float8_e5m2" => Dtype::F8E5M2,
        "LongStorage" => Dtype::Other("i64", 8),
        "IntStorage" => Dtype::Other("i32", 4),
        "ShortStorage" => Dtype::Other("i16", 2),
        "CharStorage" => Dtype::Other("i8", 1),
        "ByteStorage" => Dtype::Other("u8", 1),
        "BoolStorage" => Dtype::Other("bool", 1),
        _ => return None,
    })
}
