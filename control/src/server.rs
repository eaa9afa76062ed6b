//! The listener: HTTP/1.1 over TCP with a bound on everything that a client can make us hold.
//!
//! | what | bound | answer beyond it |
//! |---|---|---|
//! | connections | [`MOST_CONNECTIONS`] | the next waits in the kernel's queue |
//! | header of a request | 64 KiB, [`HEADER_TIMEOUT`] | closed (431, 408 by hyper) |
//! | body of a request | [`LONGEST_BODY`], [`BODY_TIMEOUT`] | `RequestEntityTooLarge`, `RequestTimeout` |
//!
//! One task accepts; each connection is then served by one of a few threads to its end.

mod threads;

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody as _};
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use self::threads::Threads;
use crate::error::ApiError;

/// Connections that are served at once.
pub const MOST_CONNECTIONS: usize = 10_000;
/// For the header of a request, and for an idle connection.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// For the body of a request.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a body.
pub const LONGEST_BODY: usize = 1024 * 1024;
/// Bytes that are read and thrown away, so that a client that sent too much gets to read the answer.
const LONGEST_DRAIN: usize = 64 * 1024 * 1024;
/// How long requests may go on after the end was asked for.
const GRACE: Duration = Duration::from_secs(5);

/// Serves until `stop` resolves, then lets the requests under way finish.
///
/// # Errors
/// When the threads that serve cannot be started.
pub async fn serve(listener: TcpListener, router: Router, stop: impl Future<Output = ()>) -> io::Result<()> {
    let threads = Threads::start("api")?;
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = accept(&listener, &room) => accepted,
        };
        let (stream, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Mostly a want of file descriptors, which passes when some connection ends.
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (router, watcher) = (router.clone(), graceful.watcher());
        threads.spawn(async move {
            let _permit = permit;
            // From here on the event loop of this thread watches the socket.
            let stream = match tokio::net::TcpStream::from_std(stream) {
                Ok(stream) => stream,
                Err(error) => return tracing::warn!(%error, "a connection cannot be watched"),
            };
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(64 * 1024).half_close(true);
            let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
            if let Err(error) = watcher.watch(connection).await {
                tracing::debug!(%error, "a connection ended with an error");
            }
        });
    }
    if tokio::time::timeout(GRACE, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests under way were cut off");
    }
    Ok(())
}

type Accepted = (std::net::TcpStream, tokio::sync::OwnedSemaphorePermit);

async fn accept(listener: &TcpListener, room: &Arc<Semaphore>) -> io::Result<Accepted> {
    let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // Answers are written whole, so waiting to fill a segment only delays them.
    stream.set_nodelay(true)?;
    Ok((stream.into_std()?, permit))
}

/// Reads a body into memory.
///
/// # Errors
/// `RequestEntityTooLarge`, `RequestTimeout` or `IncompleteBody`.
pub async fn read_body(headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| usize::try_from(length).map_or(true, |length| LONGEST_BODY < length)) {
        // Who asks first (`Expect: 100-continue`) has sent nothing yet.
        if !headers.contains_key(header::EXPECT) {
            drain(body).await;
        }
        return Err(too_large());
    }
    let read = tokio::time::timeout(BODY_TIMEOUT, collect(body)).await;
    read.map_err(|_| ApiError::with_status(408, "RequestTimeout", "The body of the request did not arrive in time"))?
}

fn too_large() -> ApiError {
    let message = format!("The body of the request exceeds the limit of {LONGEST_BODY} bytes");
    ApiError::with_status(413, "RequestEntityTooLarge", message)
}

async fn collect(mut body: Body) -> Result<Bytes, ApiError> {
    // A small body comes in one piece, which is not copied.
    let Some(first) = next(&mut body).await.map_err(|error| incomplete(&error))? else { return Ok(Bytes::new()) };
    if body.is_end_stream() && first.len() <= LONGEST_BODY {
        return Ok(first);
    }
    let mut whole = BytesMut::from(first);
    if LONGEST_BODY < whole.len() {
        drain(body).await;
        return Err(too_large());
    }
    while let Some(data) = next(&mut body).await.map_err(|error| incomplete(&error))? {
        if LONGEST_BODY < whole.len() + data.len() {
            drain(body).await;
            return Err(too_large());
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}

fn incomplete(error: &dyn Display) -> ApiError {
    ApiError::new("IncompleteBody", format!("The body of the request ended early: {error}"))
}

/// Reads on without keeping anything: an answer sent into a connection full of unread bytes would be lost in its reset.
async fn drain(mut body: Body) {
    let read = async {
        let mut room = LONGEST_DRAIN;
        while let Ok(Some(data)) = next(&mut body).await {
            let Some(rest) = room.checked_sub(data.len()) else { break };
            room = rest;
        }
    };
    // A client that stalls here loses only its own answer.
    let _ = tokio::time::timeout(BODY_TIMEOUT, read).await;
}

/// The next bytes of a body; trailers are passed over.
async fn next(body: &mut Body) -> Result<Option<Bytes>, axum::Error> {
    loop {
        let frame = std::future::poll_fn(|context| std::pin::Pin::new(&mut *body).poll_frame(context)).await;
        match frame {
            None => return Ok(None),
            Some(Err(error)) => return Err(error),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}
