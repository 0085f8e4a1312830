//! The key that clients of the server show, as `[api]` gives it. It is never printed, nor part of a message.

use std::fmt;
use std::str::FromStr;

use toml::Spanned;

use super::document::{Mistake, Table};

/// A key that clients must show: 1 to 1024 visible ASCII characters, so that it fits into a header as it is.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// Longest key, bytes.
    pub const LONGEST: usize = 1024;

    /// The key itself. To be compared with a client's in constant time (`==` is not), and never to be shown.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ApiKey(…)")
    }
}

/// A text is no [`ApiKey`]; which one is not said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key has 1 to {} visible ASCII characters, no spaces", ApiKey::LONGEST)]
pub struct BadApiKey;

impl FromStr for ApiKey {
    type Err = BadApiKey;

    fn from_str(text: &str) -> Result<Self, BadApiKey> {
        let good =
            (1..=Self::LONGEST).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        if good { Ok(Self(text.to_owned())) } else { Err(BadApiKey) }
    }
}

/// Where `serve` has its key from, if this file says so.
///
/// Only the file of the server's own project, or the one it is pointed at, is asked: no sandbox's and no client's
/// `agentkernel.toml` decides who may use the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiKeySource {
    /// `api_key`: this key. Whoever reads the file has it, sandboxes of its project included.
    Key(ApiKey),
    /// `api_key_env`: the value of this variable of the server. One that is not set, or holds no [`ApiKey`], is an error of
    /// whoever starts the server, never a server without a key.
    Variable(String),
}

pub(super) fn api_key(api: Table<'_>) -> Result<Option<ApiKeySource>, Mistake> {
    match (api.string("api_key")?, api.string("api_key_env")?) {
        (Some(_), Some(_)) => {
            let message = "`api.api_key_env` contradicts `api.api_key`";
            Err(Mistake::new(api.place("api_key_env"), message).hint("give one of them"))
        }
        (Some(key), None) => match key.get_ref().parse() {
            Ok(key) => Ok(Some(ApiKeySource::Key(key))),
            Err(error) => Err(Mistake::new(key.span().start, format!("`api.api_key`: {error}"))),
        },
        (None, Some(variable)) => variable_name(&variable).map(Some),
        (None, None) => Ok(None),
    }
}

fn variable_name(name: &Spanned<&str>) -> Result<ApiKeySource, Mistake> {
    let text = *name.get_ref();
    let word = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if word && !text.is_empty() && !text.starts_with(|first: char| first.is_ascii_digit()) {
        return Ok(ApiKeySource::Variable(text.to_owned()));
    }
    // What stands there may be the key itself, by mistake.
    let message = "`api.api_key_env` must be the name of a variable: ASCII letters, digits and _".to_owned();
    let hint = if text.starts_with('$') { "leave out the `$`" } else { "the key itself would be `api_key`" };
    Err(Mistake::new(name.span().start, message).hint(hint))
}
