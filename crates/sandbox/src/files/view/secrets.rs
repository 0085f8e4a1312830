//! Names that stand for secrets.
//!
//! A host image's pattern is one or more names joined by `/`, each with `*` for any bytes. Case does not matter.
//! What lies below a hidden directory is hidden with it.

use std::sync::LazyLock;

/// Hidden in `/etc` of a host image; whole paths below it.
const ETC: &[&str] = &[
    "NetworkManager/system-connections",
    "wpa_supplicant*",
    "wireguard",
    "openvpn",
    "netplan",
    "ppp",
    "iwd",
    "shadow*",
    "gshadow*",
    "opasswd",
    "security/opasswd",
    "sudoers*",
    "krb5.keytab",
    "samba",
    "cups",
    "fstab",
    "crypttab*",
    "apt/auth.conf*",
    "kubernetes",
    "rancher",
    "docker",
    "credstore*",
    // What tells one machine from another, and what the guest gets from us.
    "machine-id",
    "resolv.conf",
    "hosts",
    "hostname",
];

/// Hidden wherever they lie in a host image.
const ANYWHERE: &[&str] = &[
    // Private keys and the like, by form.
    "*.key",
    "privkey*.pem",
    "*-key.pem",
    "*_key.pem",
    "key.pem",
    "*.p12",
    "*.pfx",
    "*.jks",
    "*.keystore",
    "*.keytab",
    "*.kdbx",
    "*.ovpn",
    "*.ppk",
    "id_rsa",
    "id_dsa",
    "id_ecdsa",
    "id_ecdsa_sk",
    "id_ed25519",
    "id_ed25519_sk",
    // Private keys and the like, by place.
    "ssl/private",
    "pki/tls/private",
    "letsencrypt/live",
    "letsencrypt/archive",
    "letsencrypt/accounts",
    "ssh_host_*",
    "ipsec.d/private",
    "ipsec.secrets*",
    "swanctl/private",
    // Credentials of users' programs.
    ".agentkernel",
    ".aws",
    ".azure",
    ".boto",
    ".config/gcloud",
    ".config/gh",
    ".config/hub",
    ".docker/config.json",
    ".git-credentials",
    ".gnupg",
    ".kube",
    ".my.cnf",
    ".netrc",
    "_netrc",
    ".npmrc",
    ".pgpass",
    ".pypirc",
    ".s3cfg",
    ".ssh",
    ".terraformrc",
    ".terraform.d",
    ".vault-token",
    ".yarnrc.yml",
    ".bash_history",
    ".zsh_history",
    ".python_history",
    ".node_repl_history",
    ".cargo/config",
    ".cargo/config.toml",
    ".cargo/credentials",
    "credentials*.toml",
    ".gem/credentials",
    ".bundle/config",
    ".gradle/gradle.properties",
    ".m2/settings.xml",
    ".m2/settings-security.xml",
    ".nuget/NuGet.Config",
    ".env",
    ".env.*",
];

/// [`ANYWHERE`] with the last names split off, because those decide nearly always.
static ANYWHERE_SPLIT: LazyLock<Vec<(&str, &str)>> = LazyLock::new(|| {
    ANYWHERE.iter().map(|pattern| pattern.rsplit_once('/').unwrap_or(("", pattern))).collect()
});

/// Whether the deny-list of host images names this path (relative to `/`).
pub(super) fn hidden_on_host(path: &[u8]) -> bool {
    if let Some(below) = path.strip_prefix(b"etc/")
        && ETC.iter().any(|pattern| is_whole(pattern.as_bytes(), below))
    {
        return true;
    }
    let end = path.iter().rposition(|&byte| byte == b'/');
    let (above, name) = end.map_or((&[][..], path), |end| (&path[..end], &path[end + 1..]));
    ANYWHERE_SPLIT.iter().any(|(pattern_above, pattern)| {
        matches_name(pattern.as_bytes(), name) && ends_so(pattern_above.as_bytes(), above)
    })
}

/// Default hidden names of a workspace, in the syntax of `.gitignore`; a `!` line of `.agentkernelignore`
/// shows a name again.
pub(super) const WORKSPACE: &[&str] = &[
    ".env",
    ".env.*",
    "!.env.example",
    "!.env.sample",
    "!.env.template",
    "!.env.dist",
    "*.pem",
    "!cacert.pem",
    "!cacerts.pem",
    "!ca-bundle.pem",
    "!ca-certificates.pem",
    "!ca-cert.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.keystore",
    "*.jks",
    "*.kdbx",
    "*.ovpn",
    "*.ppk",
    "*.keytab",
    "id_rsa",
    "id_dsa",
    "id_ecdsa",
    "id_ecdsa_sk",
    "id_ed25519",
    "id_ed25519_sk",
    ".netrc",
    "_netrc",
    ".npmrc",
    ".pypirc",
    ".pgpass",
    ".my.cnf",
    ".git-credentials",
    ".htpasswd",
    ".vault-token",
    ".terraformrc",
    ".aws/",
    ".azure/",
    ".gnupg/",
    ".kube/",
    ".ssh/",
    ".agentkernel/",
    ".docker/config.json",
    ".config/gcloud/",
    "service-account*.json",
    "service_account*.json",
    "application_default_credentials.json",
    "client_secret*.json",
    "*.tfstate",
    "*.tfstate.*",
    "*.tfvars",
    "*.tfvars.json",
    "!*.example.tfvars",
];

/// Whether the names of `path` match those of `pattern`, one by one.
fn is_whole(pattern: &[u8], path: &[u8]) -> bool {
    let names = || path.split(|&byte| byte == b'/');
    let patterns = || pattern.split(|&byte| byte == b'/');
    names().count() == patterns().count()
        && names().zip(patterns()).all(|(name, pattern)| matches_name(pattern, name))
}

/// Whether the last names of `path` match those of `pattern`, which may be empty.
fn ends_so(pattern: &[u8], path: &[u8]) -> bool {
    let mut names = path.rsplit(|&byte| byte == b'/');
    pattern.is_empty()
        || pattern
            .rsplit(|&byte| byte == b'/')
            .all(|pattern| names.next().is_some_and(|name| matches_name(pattern, name)))
}

/// Whether `name` matches `pattern`, in which `*` stands for any bytes.
fn matches_name(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut next) = (0, 0);
    // After a `*`: where the pattern goes on, and the name's byte it was last tried from.
    let mut retry: Option<(usize, usize)> = None;
    while at < name.len() {
        match pattern.get(next) {
            Some(b'*') => {
                retry = Some((next + 1, at));
                next += 1;
            }
            Some(byte) if byte.eq_ignore_ascii_case(&name[at]) => {
                at += 1;
                next += 1;
            }
            _ => {
                let Some((pattern_at, name_at)) = retry else { return false };
                retry = Some((pattern_at, name_at + 1));
                (next, at) = (pattern_at, name_at + 1);
            }
        }
    }
    pattern[next..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_bytes() {
        for (pattern, name, expected) in [
            ("*.key", "server.KEY", true),
            ("*.key", "server.key.pub", false),
            ("*.key", ".key", true),
            ("credentials*.toml", "credentials.bak.toml", true),
            ("a*b*c", "aXbYbZc", true),
            ("a*b*c", "aXbYbZ", false),
            ("shadow*", "shadow", true),
            ("", "", true),
            ("*", "\n", true),
        ] {
            assert_eq!(matches_name(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn patterns_mean_ends_of_paths_or_whole_paths_in_etc() {
        for (path, expected) in [
            ("etc/ssl/private", true),
            ("opt/SSL/Private", true),
            ("etc/openssl/private", false),
            ("private", false),
            ("etc/hosts", true),
            ("usr/etc/hosts", false),
            ("etc/NetworkManager/system-connections", true),
            ("etc/apt/auth.conf.d", true),
            ("etc/apt", false),
            ("root/.cargo/config.toml", true),
            ("usr/share/config.toml", false),
            ("etc", false),
        ] {
            assert_eq!(hidden_on_host(path.as_bytes()), expected, "{path}");
        }
    }
}
