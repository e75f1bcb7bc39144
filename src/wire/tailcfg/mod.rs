//! The control protocol's JSON, as Go's structs write it.
//!
//! Control speaks a decade of dialects: fields come and go, Go writes `null` for an empty slice, and
//! other servers than Tailscale's imitate it. So unknown fields are ignored, `null` is an empty value
//! everywhere, and one garbled element of a list or map is left out instead of costing the run its
//! whole map. Only where leaving out would open something does a garbled value close it instead
//! (see [`dns::DnsConfig::routes`]). Source: Tailscale, tailcfg/tailcfg.go.

pub mod derp;
pub mod dns;
pub mod hostinfo;
pub mod map;
pub mod node;
pub mod register;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::marker::PhantomData;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use jiff::Timestamp;
use serde::de::{DeserializeOwned, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// So many octets of a document are unpacked at a time.
const CHUNK: usize = 64 << 10;

/// Go's zero time, which on the wire means "unset".
const ZERO_TIME: &str = "0001-01-01T00:00:00Z";

/// One whole document: a [`map::MapResponse`] or a [`register::RegisterResponse`].
///
/// # Errors
/// Those of [`parse_from`].
pub fn parse<T: DeserializeOwned>(document: &[u8]) -> Result<T, serde_json::Error> {
    parse_from(document)
}

/// The same of a document that is still being unpacked: ten million octets need not be held beside what they say.
///
/// # Errors
/// When reading fails, when the text is no JSON object, or one in which a whole part is of another kind than it must
/// be. The error may quote the document.
pub fn parse_from<T: DeserializeOwned>(document: impl Read) -> Result<T, serde_json::Error> {
    // By value and as this very type: only so an octet costs the parser no call of `read`.
    let mut document = BufReader::with_capacity(CHUNK, document);
    // Serde would take a list for a struct, and an empty one for an empty answer.
    if first_octet(&mut document).map_err(serde_json::Error::io)? != Some(b'{') {
        return Err(serde_json::Error::custom("not a JSON object"));
    }
    serde_json::from_reader(document)
}

/// The octet that follows white space; it stays to be read.
fn first_octet(document: &mut impl BufRead) -> io::Result<Option<u8>> {
    loop {
        let start = document.fill_buf()?;
        let blank = start.iter().take_while(|octet| b" \t\r\n".contains(octet)).count();
        let (first, ended) = (start.get(blank).copied(), start.is_empty());
        document.consume(blank);
        if first.is_some() || ended {
            return Ok(first);
        }
    }
}

/// `null` is the default; anything else must fit.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// What does not fit is the default: for values whose loss harms nobody.
fn lenient<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(deserializer: D) -> Result<T, D::Error> {
    let value = Value::deserialize(deserializer)?;
    Ok(T::deserialize(value).unwrap_or_default())
}

/// A list, `null` being empty; elements that do not fit are left out.
fn list<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<Vec<T>, D::Error> {
    Ok(optional_list(deserializer)?.unwrap_or_default())
}

/// As [`list`], where `null` and absence mean something else than an empty list.
fn optional_list<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<Option<Vec<T>>, D::Error> {
    Ok(Option::<Fitting<T>>::deserialize(deserializer)?.map(|Fitting(elements)| elements))
}

/// The elements of a list that fit. They are read one by one: a map of ten thousand peers is never
/// in memory a second time.
struct Fitting<T>(Vec<T>);

impl<'de, T: DeserializeOwned> Deserialize<'de> for Fitting<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(FittingVisitor(PhantomData))
    }
}

struct FittingVisitor<T>(PhantomData<T>);

impl<'de, T: DeserializeOwned> Visitor<'de> for FittingVisitor<T> {
    type Value = Fitting<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Self::Value, A::Error> {
        let mut fitting = Vec::new();
        while let Some(element) = elements.next_element::<Value>()? {
            fitting.extend(T::deserialize(element).ok());
        }
        Ok(Fitting(fitting))
    }
}

/// A map whose keys are texts of `K` (integers included), `null` being empty; entries that do not
/// fit are left out, and so are those whose value is `null`.
fn map<'de, D, K, V>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: FromStr + Ord,
    V: DeserializeOwned,
{
    Ok(optional_map(deserializer)?.unwrap_or_default())
}

/// As [`map()`], where `null` and absence mean something else than an empty map.
fn optional_map<'de, D, K, V>(deserializer: D) -> Result<Option<BTreeMap<K, V>>, D::Error>
where
    D: Deserializer<'de>,
    K: FromStr + Ord,
    V: DeserializeOwned,
{
    let entries = Option::<BTreeMap<String, Value>>::deserialize(deserializer)?;
    Ok(entries.map(|entries| {
        entries.into_iter().filter_map(|(key, value)| Some((key.parse().ok()?, V::deserialize(value).ok()?))).collect()
    }))
}

/// A capability map: attribute name to raw values, whose `null` is an empty list but a present attribute.
fn attributes<'de, D>(deserializer: D) -> Result<BTreeMap<String, Vec<Value>>, D::Error>
where
    D: Deserializer<'de>,
{
    Ok(optional_attributes(deserializer)?.unwrap_or_default())
}

/// As [`attributes`], where absence means "unchanged".
fn optional_attributes<'de, D>(deserializer: D) -> Result<Option<BTreeMap<String, Vec<Value>>>, D::Error>
where
    D: Deserializer<'de>,
{
    let entries = Option::<BTreeMap<String, Value>>::deserialize(deserializer)?;
    Ok(entries.map(|entries| {
        entries.into_iter().map(|(name, values)| (name, Vec::deserialize(values).unwrap_or_default())).collect()
    }))
}

/// A time; the zero time, `""`, `null` and what is no time are `None`.
fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    let text: Option<String> = lenient(deserializer)?;
    let zero: Timestamp = ZERO_TIME.parse().map_err(D::Error::custom)?;
    Ok(text.and_then(|text| text.parse().ok()).filter(|time| *time != zero))
}

/// As [`time`], where absence means something else than "unset".
fn changed_time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<Timestamp>>, D::Error> {
    let text: Option<Value> = lenient(deserializer)?;
    text.map(|text| time(text).map_err(D::Error::custom)).transpose()
}

/// Writes a time; `None` is the zero time, since Go wants the field to be there.
fn write_time<S: Serializer>(time: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => serializer.collect_str(time),
        None => serializer.serialize_str(ZERO_TIME),
    }
}

/// Bytes, in base64 on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bytes(pub Vec<u8>);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?.unwrap_or_default();
        STANDARD.decode(text).map(Self).map_err(D::Error::custom)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

/// A prefix as control writes it: bits beyond the mask cleared, a bare address being a host's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Prefix(IpNet);

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let net = match text.parse::<std::net::IpAddr>() {
            Ok(address) => IpNet::from(address),
            Err(_) => text.parse().map_err(D::Error::custom)?,
        };
        Ok(Self(net.trunc()))
    }
}

/// A list of prefixes; those that do not parse are left out.
fn prefixes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    Ok(optional_prefixes(deserializer)?.unwrap_or_default())
}

/// As [`prefixes`], where absence means something else than an empty list.
fn optional_prefixes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<IpNet>>, D::Error> {
    let prefixes: Option<Vec<Prefix>> = optional_list(deserializer)?;
    Ok(prefixes.map(|prefixes| prefixes.into_iter().map(|Prefix(net)| net).collect()))
}

#[cfg(test)]
mod tests {
    use super::register::RegisterResponse;
    use super::*;

    struct OctetByOctet(&'static [u8]);

    impl Read for OctetByOctet {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let most = buffer.len().min(1);
            self.0.read(&mut buffer[..most])
        }
    }

    #[test]
    fn an_object_is_known_however_little_is_read_at_once() {
        let parsed = |text: &'static str| parse_from::<RegisterResponse>(OctetByOctet(text.as_bytes()));
        assert_eq!(parsed(" \r\n\t{\"AuthURL\": null} ").unwrap(), RegisterResponse::default());
        for other in [" \n[]", "", "  ", "null"] {
            assert!(parsed(other).unwrap_err().to_string().starts_with("not a JSON object"), "{other:?}");
        }
    }
}
