//! The limit: a relay of hyper and hyper-util's pooled client that adds the key, and checks nothing at all.

#![forbid(unsafe_code)]

use std::{net::SocketAddr, path::PathBuf};

use clap::Parser;
use hyper::{
    Request, Response, Uri,
    body::Incoming,
    header::{AUTHORIZATION, HOST, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{Client, connect::Connect},
    rt::{TokioExecutor, TokioIo},
};
use tokio::net::TcpListener;
use tower_fal_proxy_bench::{AUTHORIZATION as KEY, BoxError, Fixed, trusting};

#[derive(Parser)]
struct Options {
    #[arg(long)]
    listen: SocketAddr,
    /// Where every connection ends, over TLS
    #[arg(long, required_unless_present = "connect_to_http", conflicts_with = "connect_to_http", requires = "ca_file")]
    connect_to: Option<SocketAddr>,
    /// The same in plain http
    #[arg(long)]
    connect_to_http: Option<SocketAddr>,
    #[arg(long)]
    ca_file: Option<PathBuf>,
}

// As many threads as there are cores for it, like the servers that are compared with it.
#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let options = Options::parse();
    let listener = TcpListener::bind(options.listen).await?;
    let client = Client::builder(TokioExecutor::new());
    match (options.connect_to, options.connect_to_http, options.ca_file) {
        (Some(address), None, Some(ca_file)) => {
            let connector = HttpsConnectorBuilder::new()
                .with_tls_config(trusting(&ca_file)?)
                .https_only()
                .enable_http1()
                .wrap_connector(Fixed(address));
            serve(listener, client.build(connector)).await
        }
        (_, Some(address), _) => serve(listener, client.build(Fixed(address))).await,
        _ => unreachable!("clap wants one of the two"),
    }
}

async fn serve<C>(listener: TcpListener, client: Client<C, Incoming>) -> Result<(), BoxError>
where
    C: Connect + Clone + Send + Sync + 'static,
{
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let client = client.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| relay(request, client.clone()));
            // A client may leave when it likes.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn relay<C>(mut request: Request<Incoming>, client: Client<C, Incoming>) -> Result<Response<Incoming>, BoxError>
where
    C: Connect + Clone + Send + Sync + 'static,
{
    let target = request.headers_mut().remove("x-fal-target-url").ok_or("there is no target")?;
    *request.uri_mut() = Uri::try_from(target.as_bytes())?;
    request.headers_mut().remove(HOST);
    request.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static(KEY));
    Ok(client.request(request).await?)
}
