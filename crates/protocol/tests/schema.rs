//! The wire is frozen: `schema.txt` is the shape of every message, made from the types themselves.

use agentkernel_protocol::control::{ControlReply, ControlRequest, Event, LeaseInput};
use agentkernel_protocol::message::{
    Entry, ExecFailure, ExecInput, ExecOutput, ExitStatus, Hello, HelloAnswer, LayerEntry, MountMode,
    NodeKind, Programs, Reply, Request, Root, RootSource, Writable,
};
use serde_reflection::{Samples, Tracer, TracerConfig};

#[test]
fn the_wire_is_as_frozen() {
    let mut tracer = Tracer::new(TracerConfig::default());
    let samples = Samples::new();
    macro_rules! trace {
        ($($type:ty),*) => { $( tracer.trace_type::<$type>(&samples).expect(stringify!($type)); )* };
    }
    trace!(
        ExecFailure,
        ExitStatus,
        MountMode,
        NodeKind,
        Programs,
        Root,
        RootSource,
        Writable,
        Hello,
        HelloAnswer,
        Request,
        Reply
    );
    trace!(ExecInput, ExecOutput, Entry, LayerEntry, ControlRequest, ControlReply, LeaseInput, Event);
    let schema = tracer.registry().unwrap();
    let mut text = format!("version: {}\n", agentkernel_protocol::VERSION);
    text.push_str(&serde_json::to_string_pretty(&schema).unwrap());
    text.push('\n');
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/schema.txt");
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    let frozen = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        frozen == text,
        "the wire changed: raise VERSION if it was released, then run with UPDATE_SCHEMA=1"
    );
}
