//! `FalProxy` behind hyper's server, and nothing else: what the example `proxy` has around it is not there.

#![forbid(unsafe_code)]

use std::{net::SocketAddr, path::PathBuf};

use clap::Parser;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{Client, connect::Connect},
    rt::{TokioExecutor, TokioIo},
};
use tokio::net::TcpListener;
use tower_fal::{
    Credential, CredentialStore,
    proxy::{FalProxy, UploadBody},
    retry::ReplayBody,
};
use tower_fal_proxy_bench::{AUTHORIZATION, BoxError, Fixed, trusting};

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

async fn serve<C>(listener: TcpListener, client: Client<C, ReplayBody<UploadBody<Incoming>>>) -> Result<(), BoxError>
where
    C: Connect + Clone + Send + Sync + 'static,
{
    let key = AUTHORIZATION.strip_prefix("Key ").unwrap_or_default();
    let store = CredentialStore::fixed(Credential::key(key)?);
    let proxy = FalProxy::over(&store, client).allow_anonymous();
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let proxy = proxy.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| proxy.request(request));
            // A client may leave when it likes.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}
