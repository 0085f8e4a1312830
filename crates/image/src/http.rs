//! HTTP as this program speaks it, whoever it speaks with: TLS by the system's certificates, and why something failed.

use std::time::Duration;

use reqwest::{ClientBuilder, Url};

/// How this program calls itself.
const NAME: &str = concat!("agentkernel/", env!("CARGO_PKG_VERSION"));

/// A client to be finished: proxies are taken from the environment, redirects are the caller's to decide.
pub fn client(connect_timeout: Duration) -> ClientBuilder {
    // The process's choice of cryptography; a choice made before is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().user_agent(NAME).connect_timeout(connect_timeout).referer(false)
}

/// Why a request failed, at the bottom of it.
#[derive(Debug)]
pub struct Reason {
    /// In words fit to be shown.
    pub text: String,
    /// TLS failed.
    pub is_tls: bool,
    /// TLS failed because the other side does not speak it.
    pub is_plain: bool,
}

impl Reason {
    /// Looks for the first cause.
    pub fn of(error: &reqwest::Error) -> Self {
        let mut deepest: &(dyn std::error::Error + 'static) = error;
        let mut tls = None;
        let mut next = Some(deepest);
        while let Some(cause) = next {
            deepest = cause;
            tls = tls.or(cause.downcast_ref::<rustls::Error>());
            // The system's errors hold others without calling them their source.
            let inner = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
            next = match inner {
                Some(inner) => Some(inner as &(dyn std::error::Error + 'static)),
                None => cause.source(),
            };
        }
        Self {
            text: printable(&deepest.to_string()),
            is_tls: tls.is_some(),
            is_plain: matches!(tls, Some(rustls::Error::InvalidMessage(_))),
        }
    }
}

/// Host and port of an address: the rest may hold secrets.
pub fn place(url: &Url) -> String {
    let host = url.host_str().unwrap_or("nowhere");
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// Foreign words on one line, without what a terminal would obey.
pub(crate) fn printable(text: &str) -> String {
    let kept =
        text.chars().filter(|character| !character.is_control() || character.is_whitespace()).take(300);
    kept.map(|character| if character.is_whitespace() { ' ' } else { character }).collect()
}
