//! Whether `http.listen` is free, and who has it if not.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::report::Check;

const NAME: &str = "http.listen";
/// How long whoever listens there may take to say who it is.
const ANSWER: Duration = Duration::from_secs(3);

pub(super) async fn check(address: &str) -> Check {
    if address.is_empty() {
        return Check::ok(NAME, "is empty: no /livez, no /readyz");
    }
    // Bound for a moment and let go: the only honest way to know.
    let error = match TcpListener::bind(address).await {
        Ok(_) if address.ends_with(":0") => return Check::ok(NAME, "any port that is free"),
        Ok(_) => return Check::ok(NAME, format!("{address} is free")),
        Err(error) => error,
    };
    let other = "Choose another http.listen, for example 127.0.0.1:8081, or leave it empty.";
    if error.kind() != ErrorKind::AddrInUse {
        return Check::problem(NAME, format!("{address} cannot be bound: {error}"), other);
    }
    match timeout(ANSWER, readiness(address)).await {
        Ok(Ok(answer)) if answer.starts_with("ready") || answer.starts_with("not ready") => {
            Check::ok(NAME, format!("{address} is in use by a worker that is {answer}"))
        }
        _ => Check::warning(
            NAME,
            format!("{address} is in use, and not by a worker: none can start here"),
            other,
        ),
    }
}

/// What a worker says at `/readyz`: the first line of the body.
async fn readiness(address: &str) -> std::io::Result<String> {
    let stream = TcpStream::connect(address).await?;
    let mut request: &[u8] = b"GET /readyz HTTP/1.0\r\n\r\n";
    while !request.is_empty() {
        stream.writable().await?;
        match stream.try_write(request) {
            Ok(sent) => request = &request[sent..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    let mut answer = vec![0; 4096];
    let mut filled = 0;
    while filled < answer.len() {
        stream.readable().await?;
        match stream.try_read(&mut answer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    let answer = String::from_utf8_lossy(&answer[..filled]).into_owned();
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
    Ok(body.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use angler_core::readiness::Readiness;

    use super::super::report::State;
    use super::*;
    use crate::http::serve;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_worker_that_listens_is_told_from_another_program_that_does() {
        let (address, server) = serve("127.0.0.1:0", Arc::new(Readiness::default())).await.unwrap();
        let found = check(&address.to_string()).await;
        assert_eq!(found.state, State::Ok, "{}", found.message);
        assert!(found.message.contains("by a worker that is not ready"), "{}", found.message);
        drop(server);

        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let found = check(&silent.local_addr().unwrap().to_string()).await;
        assert_eq!(found.state, State::Warning, "{}", found.message);
        let address = silent.local_addr().unwrap().to_string();
        drop(silent);
        assert_eq!(check(&address).await.state, State::Ok);
        assert_eq!(check("127.0.0.1").await.state, State::Problem);
    }
}
