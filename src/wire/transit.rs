//! What a client and an app connector say to each other of transit addresses, as JSON over the connector's PeerAPI.
//!
//! Source: Tailscale, feature/conn25/conn25.go, `ConnectorTransitIPRequest` and `ConnectorTransitIPResponse`.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Where the PeerAPI takes requests, by POST.
pub const PATH: &str = "/v0/connector/transit-ip";

/// Asks for transit addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Request<'a> {
    /// All of them; the answer is in the same order.
    #[serde(rename = "transitIPs")]
    pub transits: Vec<Transit<'a>>,
}

/// Packets to one address shall go on to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Transit<'a> {
    /// What we send to.
    #[serde(rename = "transitIP")]
    pub transit: IpAddr,
    /// Where the connector sends it on to; of the same family.
    #[serde(rename = "destinationIP")]
    pub destination: IpAddr,
    /// The app for which that is.
    pub app: &'a str,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Response {
    /// One verdict for each address asked for.
    #[serde(rename = "transitIPs", default)]
    pub verdicts: Vec<Verdict>,
}

/// What became of one address.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Verdict {
    /// 0 for agreed.
    #[serde(default)]
    pub code: u32,
    /// What the connector says of it, for a log.
    #[serde(default)]
    pub message: String,
}

impl Verdict {
    /// Whether the address is agreed upon.
    pub fn is_agreed(&self) -> bool {
        self.code == 0
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            0 => f.write_str("agreed"),
            2 => f.write_str("it was asked for one transit address twice"),
            3 => f.write_str("it knows no address of ours of that family"),
            4 => f.write_str("transit address and destination are of different families"),
            5 => f.write_str("it does not serve that app"),
            6 => f.write_str("the tailnet's policy does not let this node use that app"),
            other => write!(f, "code {other}: {:?}", self.message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_written_as_the_connector_reads_it() {
        let transit = Transit { transit: [169, 254, 7, 1].into(), destination: [10, 0, 0, 1].into(), app: "a" };
        let json = serde_json::to_string(&Request { transits: vec![transit] }).unwrap();
        assert_eq!(json, r#"{"transitIPs":[{"transitIP":"169.254.7.1","destinationIP":"10.0.0.1","app":"a"}]}"#);
    }

    #[test]
    fn no_code_is_agreement_and_an_unknown_one_is_not() {
        let read = |json: &str| serde_json::from_str::<Response>(json).unwrap().verdicts;
        let verdicts = read(r#"{"transitIPs":[{},{"code":5,"message":"m"},{"code":77,"message":"m\n"}]}"#);
        assert_eq!(verdicts.iter().map(Verdict::is_agreed).collect::<Vec<_>>(), [true, false, false]);
        assert_eq!(verdicts[1].to_string(), "it does not serve that app");
        assert_eq!(verdicts[2].to_string(), r#"code 77: "m\n""#);
        assert!(read("{}").is_empty());
    }
}
