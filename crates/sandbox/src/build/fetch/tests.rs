use std::io::Read;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// A server that gives each connection the next of `answers`, the last one for ever. Counts them.
fn serve(answers: Vec<String>) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut head = [0; 4096];
            let _ = stream.read(&mut head);
            let number = counter.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(answers[number.min(answers.len() - 1)].as_bytes());
        }
    });
    (address, count)
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

fn redirect(target: &str) -> String {
    format!("HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

fn limits() -> Limits {
    Limits {
        backoff: Duration::from_millis(1),
        idle: Duration::from_millis(500),
        bytes: 100,
        ..Limits::default()
    }
}

/// What is fetched with `allow` under mode `public`, or message and hint.
fn get(allow: &[String], address: &str) -> Result<String, Failure> {
    let allow = allow.iter().map(|rule| rule.parse().unwrap()).collect();
    let policy = Policy::new(Mode::Public, allow, Vec::new(), Vec::new());
    let mut file = tempfile::tempfile().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(fetch(&policy, &limits(), address, &mut file, &mut |_| {}))?;
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    Ok(text)
}

#[test]
fn strange_spellings_hit_the_floor() {
    for (address, entry) in [
        ("http://127.1/", "127.0.0.1:80: it is a loopback"),
        ("http://2130706433/", "127.0.0.1:80: it is a loopback"),
        ("http://0x7f000001/", "127.0.0.1:80: it is a loopback"),
        ("http://0177.0.0.1/", "127.0.0.1:80: it is a loopback"),
        ("http://0X7F.1:8080/", "127.0.0.1:8080: it is a loopback"),
        ("http://１２７.0.0.1/", "127.0.0.1:80: it is a loopback"),
        ("http://127.0.0.1./", "127.0.0.1:80: it is a loopback"),
        ("http://%31%32%37.0.0.1/", "127.0.0.1:80: it is a loopback"),
        ("http://a@127.0.0.1/", "127.0.0.1:80: it is a loopback"),
        ("https:\\\\127.0.0.1\\x", "127.0.0.1:443: it is a loopback"),
        ("http://0/", "0.0.0.0:80: it is an unspecified"),
        ("http://[::]/", "[::]:80: it is an unspecified"),
        ("http://[::1]/", "[::1]:80: it is a loopback"),
        ("http://[::ffff:127.0.0.1]/", "127.0.0.1:80: it is a loopback"),
        ("http://[0:0:0:0:0:ffff:7f00:1]/", "127.0.0.1:80: it is a loopback"),
        ("http://[::127.0.0.1]/", "it is a loopback"),
        ("http://[64:ff9b::a9fe:a9fe]/", "it is a metadata"),
        ("http://[2002:7f00:1::]/", "it is a loopback"),
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254:80: it is a metadata"),
        ("http://2852039166/", "169.254.169.254:80: it is a metadata"),
        ("http://localhost/", "which localhost leads to: it is a loopback"),
        ("http://LOCALHOST./", "which localhost leads to: it is a loopback"),
    ] {
        let failure = get(&["localhost".into(), "*.localhost".into()], address).unwrap_err();
        assert!(failure.message.contains(entry), "{address}: {}", failure.message);
        assert!(failure.hint.unwrap().contains("--allow "), "{address}");
    }
}

#[test]
fn bodies_redirects_and_failures() {
    let (address, _) = serve(vec![ok("content")]);
    let allow = [address.to_string()];
    assert_eq!(get(&allow, &format!("http://{address}/f")).unwrap(), "content");
    // A name may lead to an address that is allowed.
    assert_eq!(get(&allow, &format!("http://localhost:{}/f", address.port())).unwrap(), "content");

    let (address, count) = serve(vec![redirect("/next"), redirect("?last"), ok("there")]);
    assert_eq!(get(&[address.to_string()], &format!("http://{address}/f")).unwrap(), "there");
    assert_eq!(count.load(Ordering::SeqCst), 3);

    let unavailable = "HTTP/1.1 503 Wait\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned();
    let (address, count) = serve(vec![unavailable.clone(), unavailable.clone(), ok("late")]);
    assert_eq!(get(&[address.to_string()], &format!("http://{address}/f")).unwrap(), "late");
    assert_eq!(count.load(Ordering::SeqCst), 3);

    let cut = "HTTP/1.1 200 OK\r\nContent-Length: 50\r\nConnection: close\r\n\r\nhalf".to_owned();
    let large = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_owned() + &"x".repeat(101);
    let not_found = "HTTP/1.1 404 Gone\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned();
    for (answer, expected, requests) in [
        (unavailable, "answers 503 Service Unavailable", 4),
        (not_found, "answers 404 Not Found", 1),
        (cut, "broke: ", 1),
        (large, "sends more than 100 bytes", 1),
        (ok(&"x".repeat(101)), "sends more than 100 bytes", 1),
        ("nonsense\r\n\r\n".to_owned(), "broke: ", 1),
        (redirect("/again"), "there are more than 10 redirects", 11),
        (redirect("http://169.254.169.254/x"), "redirects to 169.254.169.254: the network policy refuses", 1),
        (redirect("http://localhost:1/x"), "which localhost leads to: it is a loopback", 1),
        (redirect("file:///etc/passwd"), "to what is neither HTTP nor HTTPS", 1),
        (
            "HTTP/1.1 301 Moved\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned(),
            "it names no address",
            1,
        ),
    ] {
        let (address, count) = serve(vec![answer]);
        let failure = get(&[address.to_string()], &format!("http://{address}/f")).unwrap_err();
        assert!(failure.message.contains(expected), "{expected}: {}", failure.message);
        assert_eq!(count.load(Ordering::SeqCst), requests, "{expected}");
    }
}

#[test]
fn servers_that_are_not_there_or_say_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let failure = get(&[address.to_string()], &format!("http://{address}/f")).unwrap_err();
    assert!(failure.message.contains("nothing came"), "{}", failure.message);
    drop(listener);
    let failure = get(&[address.to_string()], &format!("http://{address}/f")).unwrap_err();
    assert!(failure.message.contains("cannot reach 127.0.0.1"), "{}", failure.message);
    let (address, _) = serve(vec![ok("no TLS")]);
    let failure = get(&[address.to_string()], &format!("https://{address}/f")).unwrap_err();
    assert!(failure.message.contains("the TLS connection to"), "{}", failure.message);
    for text in ["http://", "http://a b/", "http://[::1/", "http://x:99999/"] {
        assert!(get(&[], text).unwrap_err().message.contains("is no address"), "{text}");
    }
}

#[test]
fn redirects_stay_encrypted() {
    let url = Url::parse("https://x.example/a/b").unwrap();
    for (location, expected) in [
        ("c", Ok("https://x.example/a/c")),
        ("//y.example", Ok("https://y.example/")),
        ("http://x.example/", Err("from HTTPS to HTTP")),
        ("http:c", Err("from HTTPS to HTTP")),
        ("ftp://x.example/", Err("neither HTTP nor HTTPS")),
        ("http://[", Err("it names no address")),
    ] {
        match (next(&url, Some(location)), expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found.as_str(), expected),
            (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
            (found, _) => panic!("{location}: {found:?}"),
        }
    }
}
