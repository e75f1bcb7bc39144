//! A capture, and the message that control must have sent for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use tailcar::netmap::Netmap;
use tailcar::netmap::session::Session;
use tailcar::wire::tailcfg;
use tailcar::wire::tailcfg::map::MapResponse;

/// Fields that a netmap and a message share, under the netmap's name and under the message's.
/// Source: Tailscale, types/netmap, `NetworkMap`, and tailcfg, `MapResponse`.
const SHARED: [(&str, &str); 7] = [
    ("SelfNode", "Node"),
    ("Peers", "Peers"),
    ("DNS", "DNSConfig"),
    ("DERPMap", "DERPMap"),
    ("Domain", "Domain"),
    ("SSHPolicy", "SSHPolicy"),
    ("DisplayMessages", "DisplayMessages"),
];

/// What one node's client showed of its tailnet.
pub(crate) struct Capture {
    /// The node's name in the file.
    pub(crate) node: String,
    /// The netmap in Go's form.
    pub(crate) raw: Value,
    /// When the file was written.
    at: Timestamp,
}

/// The captures' files right in a folder.
pub(crate) fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    let mut files: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "hujson"));
    files.sort_unstable();
    Ok(files)
}

/// All captures of a file.
pub(crate) fn read(file: &Path) -> Result<Vec<Capture>, String> {
    let text = fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    // Comments stand only in front of the document, and the rest is plain JSON.
    let document = text.find("\n{").map_or(text.as_str(), |start| &text[start..]);
    let mut whole: Value = serde_json::from_str(document).map_err(|error| format!("{}: {error}", file.display()))?;
    let at = whole["captured_at"].as_str().and_then(|at| at.parse().ok());
    let at = at.ok_or_else(|| format!("{} does not say when it was captured", file.display()))?;
    let Value::Object(captures) = whole["captures"].take() else { return Ok(Vec::new()) };
    Ok(captures.into_iter().map(|(node, mut capture)| Capture { node, raw: capture["netmap"].take(), at }).collect())
}

impl Capture {
    /// The peers in the netmap.
    pub(crate) fn peers(&self) -> &[Value] {
        list(&self.raw["Peers"])
    }

    /// The message that makes this netmap, as our parser reads it.
    pub(crate) fn message(&self) -> Result<MapResponse, String> {
        let message = serde_json::to_vec(&self.raw_message()).map_err(|error| error.to_string())?;
        tailcfg::parse(&message).map_err(|error| error.to_string())
    }

    /// The netmap that `session` makes of the message.
    pub(crate) fn netmap(&self, session: &mut Session, message: MapResponse) -> Result<Arc<Netmap>, String> {
        let applied = session.apply(message, self.at).map_err(|error| error.to_string())?;
        applied.netmap.ok_or_else(|| String::from("the message makes no netmap"))
    }

    /// The first message of a stream that leads to this netmap.
    fn raw_message(&self) -> Value {
        let shared = SHARED.iter().map(|(netmap, message)| ((*message).to_owned(), self.raw[*netmap].clone()));
        let mut message: Map<_, _> = shared.collect();
        message.insert("PacketFilters".into(), json!({"base": self.raw["PacketFilterRules"]}));
        message.insert("CollectServices".into(), self.raw["CollectServices"].clone());
        if let Value::Object(profiles) = &self.raw["UserProfiles"] {
            message.insert("UserProfiles".into(), profiles.values().cloned().collect());
        }
        if self.raw["TKAEnabled"] == true {
            message.insert("TKAInfo".into(), json!({"Head": self.raw["TKAHead"]}));
        }
        message.insert("ControlTime".into(), self.at.to_string().into());
        Value::Object(message)
    }
}

/// The elements of a list; of `null` none.
pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The texts of a list.
pub(crate) fn texts(value: &Value) -> Vec<&str> {
    list(value).iter().filter_map(Value::as_str).collect()
}

/// A text; of anything else the empty one.
pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
