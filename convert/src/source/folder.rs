//! A folder in the layout of diffusers: a subfolder per network, with its `config.json` and its weights in one file or
//! several.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::Source;
use crate::error::Error;

/// Subfolders whose weights make the model.
const NETWORKS: [&str; 4] = ["unet", "vae", "text_encoder", "text_encoder_2"];
/// Classes of VAEs.
const VAES: [&str; 2] = ["AutoencoderKL", "AutoencoderTiny"];
/// Weights by preference: whole ones before those in halves, safetensors before pickles.
const VARIANTS: [&str; 3] = ["", ".fp16", ".bf16"];
const EXTENSIONS: [&str; 2] = ["safetensors", "bin"];
const STEMS: [&str; 3] = ["diffusion_pytorch_model", "model", "pytorch_model"];
const MAX_CONFIG: u64 = 4 << 20;
const MAX_TOKENIZER: u64 = 64 << 20;

/// The `config.json` of each subfolder (`scheduler_config.json` of the scheduler), by the subfolder's name, and
/// `model_index`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Configs(BTreeMap<String, Value>);

impl Configs {
    /// What the subfolder's config says.
    pub(crate) fn get(&self, folder: &str) -> Option<&Value> {
        self.0.get(folder)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A tokenizer's files.
#[derive(Clone, Debug)]
pub(crate) struct TokenizerFiles {
    pub(crate) vocab: Vec<u8>,
    pub(crate) merges: Vec<u8>,
    /// What fills the window of each text encoder, where the folder says it.
    pub(crate) pad: [Option<String>; 2],
}

pub(super) fn read(source: &mut Source) -> Result<(), Error> {
    let folder = source.path.clone();
    let networks: Vec<&str> = NETWORKS.into_iter().filter(|n| folder.join(n).is_dir()).collect();
    if !networks.contains(&"unet") {
        return read_vae(source, &folder)?.ok_or_else(|| not_a_model(&folder));
    }
    source.configs = read_configs(&folder)?;
    for network in networks {
        let sub = folder.join(network);
        let Some(files) = weight_files(&sub)? else { continue };
        for file in files {
            source.add_file(&file, &format!("{network}."))?;
        }
    }
    source.tokenizer = tokenizer(&folder)?;
    Ok(())
}

/// A folder that is a VAE, without a model around it.
fn read_vae(source: &mut Source, folder: &Path) -> Result<Option<()>, Error> {
    let Some(config) = json(&folder.join("config.json"))? else { return Ok(None) };
    let class = config.get("_class_name").and_then(Value::as_str);
    if !class.is_some_and(|class| VAES.contains(&class)) {
        return Ok(None);
    }
    let Some(files) = weight_files(folder)? else { return Ok(None) };
    for file in files {
        source.add_file(&file, "vae.")?;
    }
    source.configs = Configs(BTreeMap::from([("vae".to_owned(), config)]));
    Ok(Some(()))
}

/// The configs of a folder; those that aren't there are left out.
pub(crate) fn read_configs(folder: &Path) -> Result<Configs, Error> {
    let mut configs = BTreeMap::new();
    for network in NETWORKS {
        if let Some(value) = json(&folder.join(network).join("config.json"))? {
            configs.insert(network.to_owned(), value);
        }
    }
    if let Some(value) = json(&folder.join("scheduler").join("scheduler_config.json"))? {
        configs.insert("scheduler".to_owned(), value);
    }
    if let Some(value) = json(&folder.join("model_index.json"))? {
        configs.insert("model_index".to_owned(), value);
    }
    Ok(Configs(configs))
}

/// The weights of a subfolder.
fn weight_files(folder: &Path) -> Result<Option<Vec<PathBuf>>, Error> {
    for extension in EXTENSIONS {
        for variant in VARIANTS {
            for stem in STEMS {
                let single = folder.join(format!("{stem}{variant}.{extension}"));
                if single.is_file() {
                    return Ok(Some(vec![single]));
                }
                for index in [
                    format!("{stem}{variant}.{extension}.index.json"),
                    format!("{stem}.{extension}.index{variant}.json"),
                ] {
                    let index = folder.join(index);
                    if let Some(value) = json(&index)? {
                        return shards(folder, &index, &value).map(Some);
                    }
                }
            }
        }
    }
    Ok(None)
}

/// The files that an index names.
fn shards(folder: &Path, index: &Path, value: &Value) -> Result<Vec<PathBuf>, Error> {
    let map = value.get("weight_map").and_then(Value::as_object);
    let names = map.map(|m| m.values().map(Value::as_str).collect::<Option<BTreeSet<&str>>>());
    let Some(Some(names)) = names else {
        return Err(Error::broken(index, "it has no weight_map"));
    };
    if let Some(name) = names.iter().find(|n| Path::new(n).file_name().is_none_or(|f| f != **n)) {
        return Err(Error::broken(index, format!("{name:?} is no file beside it")));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn tokenizer(folder: &Path) -> Result<Option<TokenizerFiles>, Error> {
    let pad = |sub: &str| -> Result<Option<String>, Error> {
        let config = json(&folder.join(sub).join("tokenizer_config.json"))?;
        let map = json(&folder.join(sub).join("special_tokens_map.json"))?;
        let token = |v: Option<Value>| match v?.get("pad_token")? {
            Value::String(text) => Some(text.clone()),
            Value::Object(o) => o.get("content")?.as_str().map(String::from),
            _ => None,
        };
        Ok(token(config).or_else(|| token(map)))
    };
    let pads = [pad("tokenizer")?, pad("tokenizer_2")?];
    for sub in ["tokenizer", "tokenizer_2"] {
        let folder = folder.join(sub);
        let vocab = file(&folder.join("vocab.json"), MAX_TOKENIZER)?;
        let merges = file(&folder.join("merges.txt"), MAX_TOKENIZER)?;
        let files = match (vocab, merges) {
            (Some(vocab), Some(merges)) => Some((vocab, merges)),
            _ => one_file(&folder.join("tokenizer.json"))?,
        };
        if let Some((vocab, merges)) = files {
            // A folder with the second tokenizer alone is one of the refiner, whose first encoder it serves.
            let pad = if sub == "tokenizer" { pads } else { [pads[1].clone(), None] };
            return Ok(Some(TokenizerFiles { vocab, merges, pad }));
        }
    }
    Ok(None)
}

/// What stands in `vocab.json` and `merges.txt`.
type VocabAndMerges = (Vec<u8>, Vec<u8>);

/// The vocabulary and the merges that stand together in the `tokenizer.json` of the tokenizers library, as the two files that
/// they were before.
fn one_file(path: &Path) -> Result<Option<VocabAndMerges>, Error> {
    #[derive(Deserialize)]
    struct Whole {
        model: Model,
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    #[derive(Deserialize)]
    struct Model {
        #[serde(rename = "type", default)]
        kind: Option<String>,
        vocab: BTreeMap<String, u32>,
        merges: Vec<Merge>,
    }
    #[derive(Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    /// Older files have a pair in one text.
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Merge {
        Text(String),
        Pair(String, String),
    }
    let Some(bytes) = file(path, MAX_TOKENIZER)? else { return Ok(None) };
    let whole: Whole = serde_json::from_slice(&bytes).map_err(|e| Error::broken(path, e.to_string()))?;
    if let Some(kind) = whole.model.kind.filter(|kind| kind != "BPE") {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            what: format!("it is a tokenizer of kind {kind}"),
        });
    }
    let mut vocab = whole.model.vocab;
    vocab.extend(whole.added_tokens.into_iter().map(|token| (token.content, token.id)));
    let mut merges = String::from("#version: 0.2\n");
    for merge in whole.model.merges {
        match merge {
            Merge::Text(text) => merges.push_str(&text),
            Merge::Pair(left, right) => merges.extend([&left, " ", &right]),
        }
        merges.push('\n');
    }
    Ok(Some((serde_json::to_vec(&vocab).expect("a vocabulary is plain data"), merges.into_bytes())))
}

/// The file's bytes; `None` where there is no such file.
fn file(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, Error> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("open", path)(e)),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::broken(path, format!("it has more than {limit} bytes")));
    }
    Ok(Some(bytes))
}

fn json(path: &Path) -> Result<Option<Value>, Error> {
    let Some(bytes) = file(path, MAX_CONFIG)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::broken(path, e.to_string()))
}

/// Names what a folder without a UNet is.
fn not_a_model(folder: &Path) -> Error {
    let class = |file: &str| -> Option<String> {
        let value = json(&folder.join(file)).ok()??;
        let name = value.get("_class_name").or_else(|| value.get("architectures")?.get(0))?;
        name.as_str().map(String::from)
    };
    let path = folder.to_owned();
    if let Some(class) = class("model_index.json") {
        return match class.contains("StableDiffusion") && !folder.join("transformer").is_dir() {
            true => Error::Missing { path, names: vec!["unet".into()] },
            false => Error::Unsupported { path, what: format!("it is a {class}") },
        };
    }
    if let Some(class) = class("config.json") {
        let hint = String::from("give the folder above it, the one with model_index.json");
        return Error::Kind { path, what: format!("a {class}"), hint };
    }
    Error::NotACheckpoint { path, why: "the folder has no unet".into() }
}
