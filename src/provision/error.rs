//! What can go wrong between a credential and an auth key, by what the user can do about it.

/// No auth key could be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MintError {
    /// A key is made for tags, and none were asked for.
    #[error("a key can only be made for tags, and --advertise-tags names none")]
    NoTags,
    /// The API does not accept the OAuth client.
    #[error("the API refused the OAuth client secret ({status}): {message}")]
    Secret {
        /// The HTTP status.
        status: u16,
        /// The API's words.
        message: String,
    },
    /// The API does not accept the workload's token, or the platform gave none.
    #[error("{by} ({status}): {message}")]
    Token {
        /// Who refused.
        by: &'static str,
        /// The HTTP status.
        status: u16,
        /// Its words.
        message: String,
    },
    /// The client may not make this key.
    #[error("the API refused to make an auth key ({status}): {message}")]
    Key {
        /// The HTTP status.
        status: u16,
        /// The API's words.
        message: String,
    },
    /// Nobody answered, or only with what may be different later.
    #[error("no auth key from {host}: {detail}")]
    Unreachable {
        /// Host and port.
        host: String,
        /// What last went wrong.
        detail: String,
    },
    /// Something answered, but it is not the API; or it could not prove that it is.
    #[error("{host} is not the API that makes auth keys: {detail}")]
    NotApi {
        /// Host and port.
        host: String,
        /// What is wrong with it.
        detail: String,
    },
}
