// nodemailer's pool and amqplib: consume, send, publish a report, acknowledge once it is confirmed.
import amqp from "amqplib";
import nodemailer from "nodemailer";

const connections = Number(process.env.BENCH_CONNECTIONS);
const transport = nodemailer.createTransport({
  host: "127.0.0.1", port: Number(process.env.BENCH_PORT), secure: false, ignoreTLS: true,
  pool: true, maxConnections: connections, maxMessages: Infinity,
});
const broker = await amqp.connect(process.env.BENCH_AMQP);
const channel = await broker.createConfirmChannel();
await channel.prefetch(256);
await channel.consume("mail.jobs.medium", async (delivery) => {
  const job = JSON.parse(delivery.content);
  const sent = await transport.sendMail({ from: "shop@example.com", to: job.to, subject: job.subject, text: job.text });
  const report = {
    type: "mail.sent", id: `${job.tenant}/${job.id}/1`, tenant: job.tenant, job: job.id,
    time: new Date().toISOString(), message_id: sent.messageId,
    results: [{ address: job.to, status: "sent", reply: sent.response }],
  };
  channel.publish("mail.reports", `report.${job.tenant}.mail.sent`, Buffer.from(JSON.stringify(report)),
    { persistent: true, contentType: "application/json" }, (error) => { if (!error) channel.ack(delivery); });
});
process.on("SIGTERM", () => process.exit(0));
