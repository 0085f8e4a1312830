//! Names that stand for secrets.
//!
//! A pattern is one or more names joined by `/`, each with `*` for any bytes; it means an entry whose path ends
//! so, or, after a leading `/`, whose whole path reads so. Case does not matter. What lies below a hidden
//! directory is hidden with it.

use super::super::abi::MAX_PATH;

/// Hidden wherever they lie in a host image.
const HOST: &[&str] = &[
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
    "/etc/NetworkManager/system-connections",
    "/etc/wpa_supplicant*",
    "/etc/wireguard",
    "/etc/openvpn",
    "/etc/netplan",
    "/etc/ppp",
    "/etc/iwd",
    "/etc/shadow*",
    "/etc/gshadow*",
    "/etc/opasswd",
    "/etc/security/opasswd",
    "/etc/sudoers*",
    "/etc/krb5.keytab",
    "/etc/samba",
    "/etc/cups",
    "/etc/fstab",
    "/etc/crypttab*",
    "/etc/apt/auth.conf*",
    "/etc/kubernetes",
    "/etc/rancher",
    "/etc/docker",
    "/etc/credstore*",
    // What tells one machine from another, and what the guest gets from us.
    "/etc/machine-id",
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/hostname",
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

/// Whether the deny-list of host images names this path (relative to `/`).
pub(super) fn hidden_on_host(path: &[u8]) -> bool {
    HOST.iter().any(|pattern| matches_path(pattern.as_bytes(), path))
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

/// Whether `path` ends as `pattern` reads, or is it where the pattern starts with a slash.
fn matches_path(pattern: &[u8], path: &[u8]) -> bool {
    if let Some(anchored) = pattern.strip_prefix(b"/") {
        let names = || path.split(|&byte| byte == b'/');
        let patterns = || anchored.split(|&byte| byte == b'/');
        return names().count() == patterns().count()
            && names().zip(patterns()).all(|(name, pattern)| matches_name(pattern, name));
    }
    let mut names = path.rsplit(|&byte| byte == b'/');
    pattern
        .rsplit(|&byte| byte == b'/')
        .all(|pattern| names.next().is_some_and(|name| matches_name(pattern, name)))
}

/// Whether `name` matches `pattern`, in which `*` stands for any bytes.
fn matches_name(pattern: &[u8], name: &[u8]) -> bool {
    debug_assert!(name.len() <= MAX_PATH);
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
    fn patterns_mean_ends_of_paths_or_whole_paths() {
        for (pattern, path, expected) in [
            ("ssl/private", "etc/ssl/private", true),
            ("ssl/private", "etc/openssl/private", false),
            ("ssl/private", "private", false),
            ("/etc/hosts", "etc/hosts", true),
            ("/etc/hosts", "usr/etc/hosts", false),
            ("/etc/hosts", "etc", false),
        ] {
            assert_eq!(matches_path(pattern.as_bytes(), path.as_bytes()), expected, "{pattern} {path}");
        }
    }
}
