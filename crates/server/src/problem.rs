//! The engine's problems as clients meet them: which status, and no path of the host's.

use agentkernel_sandbox::Problem;
use axum::http::StatusCode;

use crate::engine::Engine;

/// The status of a problem.
pub(crate) fn status(problem: &Problem) -> StatusCode {
    match problem.code.as_str() {
        "not-found" | "image-not-found" | "file-not-found" | "command-not-found" | "route" => {
            StatusCode::NOT_FOUND
        }
        "name-taken" | "running" | "not-running" | "paused" | "still-held" | "other-version"
        | "never-ran" | "no-changes" | "no-deadline" | "expired" | "image-in-use" | "in-use"
        | "ambiguous" | "restore-mismatch" | "saved-damaged" | "sandbox-died" | "is-a-directory"
        | "not-a-file" | "guest-slow" | "apply" | "store-busy" => StatusCode::CONFLICT,
        "not-granted" | "file-refused" | "command-policy" | "not-local" | "no-hardware" => {
            StatusCode::FORBIDDEN
        }
        "unauthorized" => StatusCode::UNAUTHORIZED,
        "upgrade" => StatusCode::UPGRADE_REQUIRED,
        "method" => StatusCode::METHOD_NOT_ALLOWED,
        "slow" => StatusCode::REQUEST_TIMEOUT,
        "body-too-large" | "file-too-large" => StatusCode::PAYLOAD_TOO_LARGE,
        "media-type" => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "idempotency-key-reused" => StatusCode::UNPROCESSABLE_ENTITY,
        "busy" | "too-many" => StatusCode::TOO_MANY_REQUESTS,
        "usage" | "json" | "query" | "path" | "path-invalid" | "name-invalid" | "backend-unknown"
        | "vcpus" | "memory-size" | "disk-size" | "image-name" | "image" | "registry" | "configuration"
        | "mount-target" | "mount-source" | "mounts" | "network-rules" | "ports" | "share"
        | "no-workspace" | "init-script" | "copy" | "file" | "files" | "ignore-file" | "host" | "request" => {
            StatusCode::BAD_REQUEST
        }
        "disk" | "guest-disk-full" => StatusCode::INSUFFICIENT_STORAGE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The words of a problem without paths of the host's: those that are known by what they are, and where the trouble is the
/// server's own, any.
pub(crate) fn shown(engine: &Engine, problem: &Problem) -> String {
    let mut text = hidden(engine, &problem.message);
    if status(problem).is_server_error() {
        text = without_paths(&text);
    }
    text
}

/// Words without paths of the host's that are known by what they are.
pub(crate) fn hidden(engine: &Engine, text: &str) -> String {
    engine.private_paths().into_iter().fold(text.to_owned(), |text, (path, name)| text.replace(&path, name))
}

/// Replaces what looks like an absolute path.
fn without_paths(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut before = ' ';
    let mut rest = text.chars().peekable();
    while let Some(character) = rest.next() {
        let begins = character == '/' && !before.is_alphanumeric() && before != '/' && before != '>';
        if begins && rest.peek().is_some_and(|next| next.is_alphanumeric() || matches!(next, '.' | '_')) {
            while rest
                .peek()
                .is_some_and(|next| !next.is_whitespace() && !matches!(next, ':' | ',' | ';' | ')'))
            {
                rest.next();
            }
            shown.push_str("<path>");
            before = '>';
        } else {
            shown.push(character);
            before = character;
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page about the API names codes where they belong.
    #[test]
    fn codes_have_the_status_that_is_documented() {
        let page = include_str!("../../../docs/api.md");
        let mut known = 0;
        for line in page.lines() {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            let [_, first, second, _] = cells[..] else { continue };
            let Ok(number) = first.parse::<u16>() else { continue };
            for code in second
                .split('`')
                .skip(1)
                .step_by(2)
                .filter(|word| !matches!(*word, "retry-after" | "request_id"))
            {
                assert_eq!(status(&agentkernel_sandbox::plain(code, "", None)), number, "{code}");
                known += 1;
            }
        }
        assert!(known > 50, "{known}");
    }

    #[test]
    fn paths_are_hidden_and_nothing_else() {
        for (text, expected) in [
            ("cannot read /root/.agentkernel/x: no such file", "cannot read <path>: no such file"),
            ("write a/b, or 1/2", "write a/b, or 1/2"),
            ("(/a/b) and \"/c\"", "(<path>) and \"<path>"),
            ("1 / 2", "1 / 2"),
        ] {
            assert_eq!(without_paths(text), expected);
        }
    }
}
