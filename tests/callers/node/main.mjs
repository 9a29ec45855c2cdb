//   node main.mjs AMQP_URL RACK
//
// takes calls from stdin, one JSON object a line: {"id", "method", "params", "timeoutMs", "key"}, any number at once, and
// prints {"id", "reply"} or {"id", "error"} for each as it is answered, and {"hint"} for each hint.
import { createInterface } from 'node:readline'
import { Rack } from './caller.mjs'

const print = (answer) => console.log(JSON.stringify(answer))
const rack = new Rack(process.argv[2], process.argv[3], (hint) => print({ hint }))
const calls = []
for await (const line of createInterface({ input: process.stdin })) {
  const { id, method, params, ...options } = JSON.parse(line)
  const failed = ({ code, message, retryable, details }) => print({ id, error: { code, message, retryable, details } })
  calls.push(rack.call(method, params, options).then((reply) => print({ id, reply }), failed))
}
await Promise.all(calls)
await rack.close()
