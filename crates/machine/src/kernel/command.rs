//! Running the host's package tools: their output bounded, their time too.

use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const OUTPUT_LIMIT: u64 = 1 << 20;
const POLL: Duration = Duration::from_millis(20);

/// What a command said and how it ended.
pub(crate) struct Finished {
    pub status: ExitStatus,
    pub output: String,
    pub errors: String,
}

/// Runs `command` with nothing on its standard input; ends it when `limit` has passed.
pub(crate) fn run(command: &mut Command, limit: Duration) -> io::Result<Finished> {
    let mut child = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let output = drain(child.stdout.take());
    let errors = drain(child.stderr.take());
    let status = wait(&mut child, limit);
    let text = |reader: thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
    };
    let (output, errors) = (text(output), text(errors));
    Ok(Finished { status: status?, output, errors })
}

fn drain(stream: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            let _ = (&mut stream).take(OUTPUT_LIMIT).read_to_end(&mut bytes);
            // The rest is thrown away, so that the command can go on.
            let _ = io::copy(&mut stream, &mut io::sink());
        }
        bytes
    })
}

fn wait(child: &mut Child, limit: Duration) -> io::Result<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("did not end within {} s", limit.as_secs()),
            ));
        }
        thread::sleep(POLL);
    }
}
