//! Ports, signals, users: words with a form of their own.

use agentkernel_image::FileSystem;

use crate::executor::Failure;

/// Largest `/etc/passwd` or `/etc/group` that is read, bytes.
const FILE_LIMIT: usize = 4 << 20;
/// Most ports of one range.
const RANGE_LIMIT: u16 = 10_000;

/// `80`, `80/udp`, `8000-8005/tcp`: each port with its protocol.
pub(super) fn ports(text: &str) -> Result<Vec<String>, Failure> {
    let wrong = || Failure {
        message: format!("`{text}` is no port"),
        hint: Some("write a number, a range, and /udp or /sctp if it is not TCP: 80, 8000-8010/udp".into()),
    };
    let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
        return Err(wrong());
    }
    // A published port before the container's says nothing in an image.
    let range = range.rsplit(':').next().unwrap_or(range);
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (first, last): (u16, u16) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
    if first > last || last - first >= RANGE_LIMIT {
        return Err(wrong());
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

/// `USER[:GROUP]`, each a name or a number, looked up in the image's own files.
pub(super) fn owner(text: &str, files: &FileSystem) -> Result<(u32, u32), Failure> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let passwd = read(files, b"/etc/passwd");
    let entry = fields(&passwd).find(|fields| fields.len() >= 4 && fields[0] == user);
    let uid = match (user.parse::<u32>(), &entry) {
        (Ok(uid), _) => uid,
        (Err(_), Some(fields)) => {
            fields[2].parse().map_err(|_| Failure::new(format!("the user {user} has no id")))?
        }
        (Err(_), None) => return Err(Failure::new(format!("there is no user called `{user}` in the image"))),
    };
    let gid = match group {
        // As Docker has it: a lone number is both, a lone name's group is that of the same id.
        None => match (&entry, user.parse::<u32>()) {
            (Some(fields), Err(_)) => fields[3].parse().unwrap_or(uid),
            _ => uid,
        },
        Some(group) => match group.parse::<u32>() {
            Ok(gid) => gid,
            Err(_) => {
                let groups = read(files, b"/etc/group");
                let entry = fields(&groups).find(|fields| fields.len() >= 3 && fields[0] == group);
                let gid = entry.and_then(|fields| fields[2].parse().ok());
                gid.ok_or_else(|| Failure::new(format!("there is no group called `{group}` in the image")))?
            }
        },
    };
    Ok((uid, gid))
}

fn fields(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.split(':').collect())
}

fn read(files: &FileSystem, path: &[u8]) -> String {
    let node = files.resolve(path, true).ok().and_then(|resolved| resolved.node);
    let mut content = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    while let Some(node) = node {
        match files.read_at(node, &mut buffer, content.len() as u64) {
            Ok(count) if count > 0 && content.len() < FILE_LIMIT => {
                content.extend_from_slice(&buffer[..count])
            }
            _ => break,
        }
    }
    String::from_utf8_lossy(&content).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges() {
        assert_eq!(ports("80").unwrap(), ["80/tcp"]);
        assert_eq!(ports("8000-8002/UDP").unwrap(), ["8000/udp", "8001/udp", "8002/udp"]);
        for bad in ["", "x", "80/x", "70000", "9-8", "1-65535"] {
            assert!(ports(bad).is_err(), "{bad}");
        }
    }
}
