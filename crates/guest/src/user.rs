//! Who a program runs as: `NAME|UID[:NAME|GID]`, looked up in the guest's own files.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

/// Most bytes of `/etc/passwd` and `/etc/group` that are looked at.
const FILE_LIMIT: u64 = 4 << 20;

/// Ids and what belongs to them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups, the primary one left out.
    pub groups: Vec<u32>,
    /// Login name and home, where `/etc/passwd` tells.
    pub name: Option<String>,
    pub home: Option<String>,
}

/// Looks `text` up in the files of the guest, or of another root.
///
/// # Errors
/// Says which user or group there is not.
pub(crate) fn resolve(text: &str, root: Option<&OwnedFd>) -> Result<User, String> {
    resolve_in(text, &read(root, "/etc/passwd"), &read(root, "/etc/group"))
}

fn read(root: Option<&OwnedFd>, path: &str) -> String {
    let mut content = Vec::new();
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let opened = match root {
        Some(root) => openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT),
        None => rustix::fs::open(path, flags, Mode::empty()),
    };
    if let Ok(file) = opened.map(File::from) {
        // A file that cannot be read names nobody, and numbers need no names.
        let _ = file.take(FILE_LIMIT).read_to_end(&mut content);
    }
    String::from_utf8_lossy(&content).into_owned()
}

/// As [`resolve`], with the files' content given. An empty text means root.
fn resolve_in(text: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (user, wanted_group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let entries =
        || passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|fields| fields.len() >= 6);
    let by_name = entries().find(|fields| fields[0] == user && fields[2].parse::<u32>().is_ok());
    let number = user.parse::<u32>().ok();
    let entry = by_name
        .or_else(|| entries().find(|fields| number.is_some() && fields[2].parse::<u32>().ok() == number));
    let uid = match (&entry, number) {
        (Some(fields), _) => fields[2].parse().map_err(|_| format!("user {user} has no id"))?,
        (None, Some(number)) => number,
        (None, None) => return Err(format!("there is no user {user} in the guest")),
    };
    let own_group = entry.as_ref().and_then(|fields| fields[3].parse().ok()).unwrap_or(0);
    let gid = match wanted_group.filter(|group| !group.is_empty()) {
        Some(wanted) => find_group(wanted, group)?,
        None => own_group,
    };
    let name = entry.as_ref().map(|fields| fields[0].to_owned());
    let home = entry.as_ref().map(|fields| fields[5].to_owned()).filter(|home| home.starts_with('/'));
    // As with Docker: whoever names a group gets that group only.
    let groups = match (&name, wanted_group) {
        (Some(name), None) => memberships(name, group).filter(|group| *group != gid).collect(),
        _ => Vec::new(),
    };
    Ok(User { uid, gid, groups, name, home })
}

fn find_group(wanted: &str, group: &str) -> Result<u32, String> {
    let named = group.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.len() >= 3 && fields[0] == wanted).then(|| fields[2].parse().ok()).flatten()
    });
    named.or_else(|| wanted.parse().ok()).ok_or_else(|| format!("there is no group {wanted} in the guest"))
}

fn memberships<'a>(name: &'a str, group: &'a str) -> impl Iterator<Item = u32> + 'a {
    group.lines().filter_map(move |line| {
        let fields: Vec<&str> = line.split(':').collect();
        let member = fields.len() >= 4 && fields[3].split(',').any(|member| member == name);
        if member { fields[2].parse().ok() } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1001::/srv/app:/bin/sh\n7:x:70:71::/seven:/\n";
    const GROUP: &str = "root:x:0:\napp:x:1001:\nextra:x:77:other,app\nmore:x:78:app\n";

    fn ids(text: &str) -> Result<(u32, u32, Vec<u32>), String> {
        resolve_in(text, PASSWD, GROUP).map(|user| (user.uid, user.gid, user.groups))
    }

    #[test]
    fn names_and_numbers_mean_what_docker_means_by_them() {
        assert_eq!(ids(""), Ok((0, 0, vec![])));
        assert_eq!(ids("app"), Ok((1000, 1001, vec![77, 78])));
        assert_eq!(ids("1000"), Ok((1000, 1001, vec![77, 78])));
        assert_eq!(ids("app:extra"), Ok((1000, 77, vec![])));
        assert_eq!(ids("app:5"), Ok((1000, 5, vec![])));
        assert_eq!(ids("4242"), Ok((4242, 0, vec![])));
        assert_eq!(ids("4242:4243"), Ok((4242, 4243, vec![])));
        assert_eq!(ids("7"), Ok((70, 71, vec![])));
        for bad in ["nobody-here", "app:no-group", "-1", "99999999999", "app:-1"] {
            assert!(ids(bad).is_err(), "{bad}");
        }
        assert_eq!(resolve_in("app", PASSWD, GROUP).unwrap().home.as_deref(), Some("/srv/app"));
        assert_eq!(resolve_in("9", "", "").unwrap().name, None);
    }
}
