//! What admits this run, and where it comes from: an auth key, an OAuth client's secret, or a workload's identity.
//!
//! Flags win over variables. Among variables the order is that of Tailscale's own programs (tsnet, `resolveAuthKey`):
//! an auth key, its file, a client's secret, an identity.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::environment::{
    AUDIENCE, AUTH_KEY_FILE, AUTH_KEYS, CLIENT_ID, CLIENT_SECRET, Environment, ID_TOKEN, SECRETS, present,
};
use super::handed::{self, Handed};
use super::key_source::KeySource;
use crate::fault::{self, Fault};
use crate::key::AuthKey;
use crate::provision::{ClientId, ClientSecret, Credential, GitHub, IdToken, Identity, Maker, TokenSource};
use crate::transport::underlay::plain_http_allowed;

/// What the flags say of it.
#[derive(Debug, Default)]
pub(super) struct Flags {
    /// `--auth-key`.
    pub(super) auth_key: Option<KeySource>,
    /// `--auth-key-fd`.
    pub(super) auth_key_fd: Option<u32>,
    /// `--client-id`.
    pub(super) client_id: Option<ClientId>,
    /// `--id-token`.
    pub(super) id_token: Option<KeySource>,
    /// `--audience`.
    pub(super) audience: Option<String>,
}

/// Where it comes from.
#[derive(Debug)]
pub(super) enum CredentialSource {
    /// An auth key, or a client's secret: its prefix tells.
    Key(KeySource),
    /// A workload's identity.
    Identity {
        /// The federated client.
        client: ClientId,
        /// Its proof.
        token: TokenFrom,
    },
}

/// Where an ID token comes from.
#[derive(Debug)]
pub(super) enum TokenFrom {
    /// It is given.
    Source(KeySource),
    /// The runner of a GitHub Actions job is asked.
    GitHub(Box<GitHub>),
}

/// What a GitHub Actions job is given. Not ours alone, so it stays in the environment.
const GITHUB: [&str; 2] = ["ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"];

type Secrets = BTreeMap<String, Handed>;

impl CredentialSource {
    /// The source that holds. What was handed over is taken out of its pipe whichever it is.
    ///
    /// # Errors
    /// `TC-1007` for a bare value, `TC-1008` when there is no source at all, `TC-1016` for an identity without a token,
    /// `TC-1015` and `TC-1004` for a client id that cannot be, `TC-1006` for a pipe that cannot be read.
    pub(super) fn choose(flags: Flags, env: &Environment) -> Result<Self, Fault> {
        let handed = handed::take(env);
        if let Some(source) = flags.auth_key {
            return given(source, "an auth key").map(Self::Key);
        }
        if let Some(number) = flags.auth_key_fd {
            return Ok(Self::Key(KeySource::Descriptor(number)));
        }
        let mut handed = handed?;
        if flags.client_id.is_some() || flags.id_token.is_some() || flags.audience.is_some() {
            return Self::identity(flags, &mut handed, env);
        }
        if let Some(key) = AUTH_KEYS.iter().find_map(|name| handed.remove(*name)) {
            return Ok(Self::Key(KeySource::Variable(key)));
        }
        if let Some(path) = present(env, AUTH_KEY_FILE) {
            return Ok(Self::Key(KeySource::File(PathBuf::from(path))));
        }
        if let Some(secret) = handed.remove(CLIENT_SECRET) {
            return Ok(Self::Key(KeySource::Variable(secret)));
        }
        if present(env, CLIENT_ID).is_some() {
            return Self::identity(flags, &mut handed, env);
        }
        let mut names = SECRETS.iter().chain([&AUTH_KEY_FILE]);
        let set_to_nothing = names.any(|name| env.contains_key(&OsString::from(name)));
        if set_to_nothing { Ok(Self::Key(KeySource::EmptyVariable)) } else { Err(Fault::from(&fault::KEY_NONE)) }
    }

    /// A workload's identity, each part from its flag or else from its variable.
    fn identity(flags: Flags, handed: &mut Secrets, env: &Environment) -> Result<Self, Fault> {
        let client = match (flags.client_id, present(env, CLIENT_ID).and_then(|id| id.to_str())) {
            (Some(client), _) => client,
            (None, Some(id)) => ClientId::parse(id).map_err(|error| {
                let fault = Fault::from(&error);
                Fault::new(fault.row, format!("{CLIENT_ID}: {}", fault.detail))
            })?,
            (None, None) => return Err(Fault::new(&fault::USAGE, "--id-token and --audience need --client-id")),
        };
        if let Some(source) = flags.id_token {
            return Ok(Self::Identity { client, token: TokenFrom::Source(given(source, "an ID token")?) });
        }
        if let Some(token) = handed.remove(ID_TOKEN) {
            return Ok(Self::Identity { client, token: TokenFrom::Source(KeySource::Variable(token)) });
        }
        let audience = flags.audience.or_else(|| Some(present(env, AUDIENCE)?.to_str()?.to_owned()));
        if let Some(audience) = audience {
            return Ok(Self::Identity { client, token: TokenFrom::GitHub(Box::new(github(audience, env)?)) });
        }
        match handed.remove(CLIENT_SECRET) {
            // Its id is part of the secret.
            Some(secret) => Ok(Self::Key(KeySource::Variable(secret))),
            None => Err(Fault::from(&fault::ID_TOKEN_NONE)),
        }
    }

    /// Whether standard input is read for it.
    pub(super) fn reads_stdin(&self) -> bool {
        self.source() == Some(&KeySource::Stdin)
    }

    /// Whether a command that inherits our descriptors could read it too.
    ///
    /// # Errors
    /// Those of [`KeySource::check_for_command`].
    pub(super) fn check_for_command(&self) -> Result<(), Fault> {
        self.source().map_or(Ok(()), KeySource::check_for_command)
    }

    fn source(&self) -> Option<&KeySource> {
        match self {
            Self::Key(source) | Self::Identity { token: TokenFrom::Source(source), .. } => Some(source),
            Self::Identity { token: TokenFrom::GitHub(_), .. } => None,
        }
    }

    /// Reads it, within `limit`: a pipe or a terminal may stay silent. Nothing stays behind here.
    ///
    /// # Errors
    /// The faults of family 10xx.
    pub(super) async fn read(self, limit: Duration) -> Result<Credential, Fault> {
        let (client, token) = match self {
            Self::Key(source) => {
                let name = source.name();
                let text = source.read("auth key", limit).await?;
                return key(&text).map_err(|fault| from_source(&fault, &name));
            }
            Self::Identity { client, token } => (client, token),
        };
        let token = match token {
            TokenFrom::GitHub(job) => TokenSource::GitHub(job),
            TokenFrom::Source(source) => {
                let name = source.name();
                let text = source.read("ID token", limit).await?;
                let token = IdToken::parse(&text).map_err(|error| from_source(&Fault::from(&error), &name))?;
                TokenSource::Given(token)
            }
        };
        Ok(Credential::Maker(Maker::Identity(Identity { client, token })))
    }
}

/// An auth key, or the secret of a client that makes one.
fn key(text: &str) -> Result<Credential, Fault> {
    if text.trim_start().starts_with(ClientSecret::PREFIX) {
        let secret = ClientSecret::parse(text).map_err(|error| Fault::from(&error))?;
        return Ok(Credential::Maker(Maker::Client(secret)));
    }
    AuthKey::parse(text).map(Credential::AuthKey).map_err(|error| Fault::from(&error))
}

fn from_source(fault: &Fault, name: &str) -> Fault {
    Fault::new(fault.row, format!("{} (from {name})", fault.detail))
}

/// A source that a flag names; a bare value is refused.
fn given(source: KeySource, what: &str) -> Result<KeySource, Fault> {
    if source != KeySource::NoSource {
        return Ok(source);
    }
    let detail = format!("{what} on the command line can be read by every process of the machine");
    Err(Fault::new(&fault::KEY_ON_ARGV, detail))
}

/// What to ask the runner of a GitHub Actions job with.
fn github(audience: String, env: &Environment) -> Result<GitHub, Fault> {
    let [url, bearer] = GITHUB.map(|name| present(env, name).and_then(|value| value.to_str()));
    let (Some(url), Some(bearer)) = (url, bearer) else {
        let detail = "an audience alone gets an ID token only from GitHub Actions, and this is no such job with \
                      permissions: id-token: write";
        return Err(Fault::new(&fault::ID_TOKEN_NONE, detail));
    };
    let safe = |url: &Url| url.scheme() == "https" || (url.scheme() == "http" && plain_http_allowed(url));
    let Some(url) = Url::parse(url).ok().filter(safe) else {
        return Err(Fault::new(&fault::SETTING, format!("{} is no https:// URL", GITHUB[0])));
    };
    Ok(GitHub { url, bearer: bearer.to_owned().into(), audience })
}

#[cfg(test)]
mod tests;
