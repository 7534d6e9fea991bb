//! `amqps` with an authority of the operator's own.

use postroom::broker::{self, BrokerError};
use postroom_testkit::proxy::Proxy;
use url::Url;

use crate::broker_session::{Running, consume, publish_many};
use crate::support::World;

#[tokio::test]
async fn a_broker_with_a_private_authority_is_trusted_through_the_ca_file_only() {
    let world = World::new().await;
    let mut url = Url::parse(world.amqp_url()).unwrap();
    let plain = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(5672));
    let proxy = Proxy::start_tls(plain).await;
    url.set_host(Some("localhost")).unwrap();
    url.set_port(Some(proxy.port())).unwrap();
    let mut config = world.broker_config();
    config.url = url.as_str().replacen("amqp://", "amqps://", 1).into();

    let error = broker::connect(&config, "test").await.unwrap_err();
    assert!(matches!(error, BrokerError::Connect { .. }), "{error}");
    let ca_file = world.dir().join("ca.pem");
    config.ca_file = Some(ca_file.clone());
    let error = broker::connect(&config, "test").await.unwrap_err().to_string();
    assert!(error.contains("POSTROOM_AMQP_CA_FILE"), "{error}");

    std::fs::write(&ca_file, proxy.ca_pem()).unwrap();
    let mut running = Running::start(config);
    let session = running.session().await;
    publish_many(&world, 1).await;
    let delivery = consume(&session, 1).await.next().await.unwrap();
    delivery.receipt.ack();
    running.stop().await;
    world.wait_depth("mail.jobs.low", 0).await;
}
