//! What may follow a `?` behind an OAuth client's secret or id: how the key shall be made, and where.
//!
//! Source: Tailscale, feature/oauthkey and feature/identityfederation, `parseOptionalAttributes`. They disagree where
//! `ephemeral` is left out beside other attributes: true for a secret, false for an id. Here it is true unless it is
//! written otherwise: a run that should leave nothing behind must not depend on such a difference.

use url::{Url, form_urlencoded};

use super::CredentialError;
use crate::transport::underlay::plain_http_allowed;

/// How a key is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Whether the node is forgotten soon after it goes offline. Defaults to `true`.
    pub ephemeral: bool,
    /// Whether no administrator needs to approve the node. Defaults to `false`.
    pub preauthorized: bool,
}

impl Default for Attributes {
    fn default() -> Self {
        Self { ephemeral: true, preauthorized: false }
    }
}

impl Attributes {
    /// Splits `text` at its first `?` and reads what follows; the URL is that of `baseURL`.
    ///
    /// # Errors
    /// [`CredentialError`] for an unknown name, one that is there twice, and a value that cannot be.
    pub(super) fn split(text: &str) -> Result<(&str, Self, Option<Url>), CredentialError> {
        let Some((head, tail)) = text.split_once('?') else { return Ok((text, Self::default(), None)) };
        let (mut all, mut url) = (Self::default(), None);
        let mut seen = Vec::new();
        for (name, value) in form_urlencoded::parse(tail.as_bytes()) {
            if seen.contains(&name) {
                return Err(CredentialError::Attribute { name: shown(&name), problem: "is there twice" });
            }
            match name.as_ref() {
                "ephemeral" => all.ephemeral = boolean(&name, &value, all.ephemeral)?,
                "preauthorized" => all.preauthorized = boolean(&name, &value, all.preauthorized)?,
                "baseURL" => url = base(&value)?,
                _ => return Err(CredentialError::Attribute { name: shown(&name), problem: "is not known" }),
            }
            seen.push(name);
        }
        Ok((head, all, url))
    }
}

/// A name as an error may repeat it: short, and without what could be anything else than a name.
fn shown(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).take(24).collect()
}

/// A truth value as Go reads one; nothing is the default.
fn boolean(name: &str, value: &str, default: bool) -> Result<bool, CredentialError> {
    match value {
        "" => Ok(default),
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(CredentialError::Attribute { name: shown(name), problem: "is neither true nor false" }),
    }
}

/// The API's URL. What the secret is sent to must be proven by TLS, unless it is as near as a test.
fn base(value: &str) -> Result<Option<Url>, CredentialError> {
    if value.is_empty() {
        return Ok(None);
    }
    let wrong = |problem| CredentialError::Attribute { name: String::from("baseURL"), problem };
    let url = Url::parse(value).map_err(|_| wrong("is not a URL such as https://api.example.com"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(wrong("is neither https:// nor http://"));
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("has more than scheme, host, port and path"));
    }
    if url.scheme() == "http" && !plain_http_allowed(&url) {
        return Err(wrong("is plain HTTP to a host that is neither loopback nor private"));
    }
    Ok(Some(url))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn without_attributes_everything_has_its_default() {
        for text in ["x", "x?", "x?ephemeral=&preauthorized=&baseURL="] {
            assert_eq!(Attributes::split(text).unwrap(), ("x", Attributes::default(), None), "{text}");
        }
    }

    #[test]
    fn a_node_stays_ephemeral_until_it_is_written_otherwise() {
        let (_, all, _) = Attributes::split("x?preauthorized=true").unwrap();
        assert!(all.ephemeral && all.preauthorized);
        assert!(!Attributes::split("x?ephemeral=false").unwrap().1.ephemeral);
    }

    #[test]
    fn what_is_not_understood_is_named_and_not_ignored() {
        let problem = |text| {
            let CredentialError::Attribute { name, problem } = Attributes::split(text).unwrap_err() else {
                panic!("{text}")
            };
            (name, problem)
        };
        assert_eq!(problem("x?ephemral=true"), (String::from("ephemral"), "is not known"));
        assert_eq!(problem("x?ephemeral=yes").1, "is neither true nor false");
        assert_eq!(problem("x?ephemeral=1&ephemeral=0").1, "is there twice");
        assert_eq!(problem("x?baseURL=api.example").1, "is not a URL such as https://api.example.com");
        assert_eq!(problem("x?baseURL=ftp://a").1, "is neither https:// nor http://");
        assert_eq!(problem("x?baseURL=https://me:pw@a").1, "has more than scheme, host, port and path");
        let plain = "is plain HTTP to a host that is neither loopback nor private";
        assert_eq!(problem("x?baseURL=http://api.example.com").1, plain);
        assert!(Attributes::split("x?baseURL=http://127.0.0.1:1").is_ok());
    }

    proptest! {
        #[test]
        fn any_text_is_split_or_refused(text in "\\PC{0,60}") {
            if let Ok((head, ..)) = Attributes::split(&text) {
                prop_assert!(text.starts_with(head) && !head.contains('?'));
            }
        }
    }
}
