//! The SMTP sink, as its user drives it: a process with flags and a script file, JSON lines on its output.
#![expect(clippy::unwrap_used, reason = "a scenario that cannot go on has failed")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

struct Sink(Child);

impl Drop for Sink {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(flags: &[&str]) -> (Sink, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_smtp-sink"))
        .args(["--listen", "127.0.0.1:0"])
        .args(flags)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let address = line.trim().strip_prefix("listening on ").unwrap().to_owned();
    (Sink(child), address)
}

/// Says these lines one after the other; the code of each reply, 0 if the connection ended instead.
fn talk(address: &str, lines: &[&str]) -> Vec<u16> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut replies = BufReader::new(stream.try_clone().unwrap());
    let mut code = || loop {
        let mut line = String::new();
        if replies.read_line(&mut line).unwrap_or(0) == 0 {
            return 0;
        }
        if line.as_bytes().get(3) == Some(&b' ') {
            return line[..3].parse().unwrap();
        }
    };
    let mut codes = vec![code()];
    for line in lines {
        if stream.write_all(format!("{line}\r\n").as_bytes()).is_err() {
            break;
        }
        codes.push(code());
    }
    codes
}

const MAIL: &str = "X-Postroom-ID: order-1\r\nMessage-ID: <1@x.example>\r\nSubject: Hello\r\n\r\nHi\r\n.";

#[test]
fn the_sink_misbehaves_as_its_script_says_and_prints_what_it_took() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("script.json");
    let plan = r#"{"rules": [{"at": "final_dot", "do": "take_then_close", "after": 1, "times": 1},
                             {"at": "mail", "do": {"reply_then_close": "421 4.3.2 Bye"}, "after": 2}],
                   "recipients": [{"local": "nobody", "reply": "550 5.1.1 No such user"}]}"#;
    std::fs::write(&script, plan).unwrap();
    let (mut sink, address) = start(&["--script", script.to_str().unwrap(), "--count", "2"]);

    let to_ann = [
        "EHLO c.example",
        "MAIL FROM:<a@x.example>",
        "RCPT TO:<nobody@x.example>",
        "RCPT TO:<ann@x.example>",
        "DATA",
        MAIL,
    ];
    assert_eq!(talk(&address, &to_ann), [220, 250, 250, 550, 250, 354, 250]);
    assert_eq!(talk(&address, &to_ann), [220, 250, 250, 550, 250, 354, 0]);
    assert_eq!(talk(&address, &to_ann[..2]), [220, 250, 421]);

    let output = BufReader::new(sink.0.stdout.take().unwrap());
    let lines: Vec<Value> = output
        .lines()
        .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
        .collect();
    let answered: Vec<_> = lines
        .iter()
        .map(|line| line["answered"].as_bool().unwrap())
        .collect();
    assert_eq!(answered, [true, false], "the second was taken without an answer");
    assert_eq!(lines[0]["to"], serde_json::json!(["ann@x.example"]));
    assert_eq!(lines[0]["job"], "order-1");
    assert_eq!(lines[0]["message_id"], "<1@x.example>");
    assert_eq!(lines[0]["sha256"], lines[1]["sha256"], "the same bytes");
    assert_eq!(lines[0]["sha256"].as_str().unwrap().len(), 64);
    assert!(sink.0.wait().unwrap().success());
}

#[test]
fn the_sink_offers_what_it_is_told_and_demands_a_login() {
    let (_sink, address) = start(&[
        "--login",
        "u:p",
        "--size",
        "100",
        "--without",
        "pipelining,8bitmime",
    ]);
    let lines = [
        "EHLO c.example",
        "MAIL FROM:<a@x.example>",
        "AUTH PLAIN AHUAcA==",
        "MAIL FROM:<a@x.example> SIZE=200",
    ];
    assert_eq!(talk(&address, &lines), [220, 250, 530, 235, 552]);
}
