import { Agent, get } from 'node:http';

/** Sends requests over kept-alive connections, each as soon as the one before it on its connection is answered. */
export async function sendRequests(urlOf: (n: number) => string, { requests, connections }: { requests: number; connections: number }) {
  const agent = new Agent({ keepAlive: true, maxSockets: connections });
  let sent = 0;
  const client = async (): Promise<void> => {
    while (sent < requests) await send(urlOf(sent++), agent);
  };
  await Promise.all(Array.from({ length: connections }, client));
  agent.destroy();
}

function send(url: string, agent: Agent): Promise<void> {
  return new Promise((resolve, reject) => {
    get(url, { agent }, (res) => {
      res.resume();
      if (res.statusCode !== 200) reject(new Error(`${url} was answered with ${res.statusCode}`));
      else res.on('end', resolve);
    }).on('error', reject);
  });
}
