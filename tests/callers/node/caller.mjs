// A caller in Node. All it knows stands in the README, "On the wire", and in schemas/asyncapi.json.
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import amqp from 'amqplib'

class CallError extends Error {
  constructor({ code, message, retryable = false, details = {} }) {
    super(message)
    Object.assign(this, { code, retryable, details })
  }
}

export class Rack {
  #url
  #rack
  #onHint
  #opening // the promise of a link: one connection, its channel and who waits on it; undefined after a loss

  constructor(url, rack, onHint) {
    this.#url = url
    this.#rack = rack
    this.#onHint = onHint
  }

  // The reply, or a CallError. What is retryable is tried again until the time is over, always with the same key.
  async call(method, params, { timeoutMs = 30_000, key = randomUUID() } = {}) {
    const deadline = Date.now() + timeoutMs
    for (let ceiling = 50; ; ceiling = Math.min(2 * ceiling, 3000)) {
      try {
        return await this.#once(method, params, deadline, key)
      } catch (error) {
        const pause = (error.details?.retryAfterMs ?? 0) + Math.random() * ceiling
        if (!error.retryable || Date.now() + pause >= deadline) throw error
        await sleep(pause)
      }
    }
  }

  async close() {
    const link = await this.#opening?.catch(() => undefined)
    await link?.connection.close()
  }

  async #once(method, params, deadline, key) {
    const { channel, waiters } = await (this.#opening ??= this.#open())
    const correlationId = randomUUID()
    const left = Math.max(deadline - Date.now(), 1)
    let timer
    const answered = new Promise((resolve, reject) => {
      const fail = (code, message, retryable) => reject(new CallError({ code, message, retryable }))
      waiters.set(correlationId, { resolve, fail })
      timer = setTimeout(fail, left, 'ERR_DEADLINE_EXCEEDED', 'No answer in time.', true)
      const properties = {
        mandatory: true, persistent: true, contentType: 'application/json', replyTo: 'amq.rabbitmq.reply-to',
        correlationId, messageId: correlationId, expiration: String(left), type: method,
        headers: { 'x-deadline': { '!': 'int64', value: deadline }, 'x-idempotency-key': key },
      }
      const refused = (error) => error && fail('ERR_OVERLOADED', 'The queue of the rack is full.', true)
      channel.publish('model-manager.rpc', `${this.#rack}.${method}`, Buffer.from(JSON.stringify(params)), properties, refused)
    })
    try {
      const reply = await answered
      if (!reply.success) throw new CallError(reply.error)
      return reply
    } finally {
      clearTimeout(timer)
      waiters.delete(correlationId)
    }
  }

  async #open() {
    const waiters = new Map()
    const lose = () => {
      this.#opening = undefined
      for (const { fail } of waiters.values()) fail('ERR_SHUTTING_DOWN', 'The connection to the broker was lost.', true)
    }
    try {
      const connection = await amqp.connect(this.#url, { heartbeat: 10 })
      connection.on('error', () => {}).on('close', lose)
      const channel = await connection.createConfirmChannel()
      channel.on('error', () => {}).on('close', () => connection.close().catch(() => {}))
      channel.on('return', ({ properties }) =>
        waiters.get(properties.correlationId)?.fail('ERR_NOT_FOUND', 'No such rack on that broker.', false))
      const answer = ({ properties, content }) => waiters.get(properties.correlationId)?.resolve(JSON.parse(content))
      await channel.consume('amq.rabbitmq.reply-to', answer, { noAck: true })
      const { queue } = await channel.assertQueue(`model-manager-${this.#rack}.hints.${randomUUID()}`, { exclusive: true })
      await channel.bindQueue(queue, 'model-manager.hints', '')
      await channel.consume(queue, ({ content }) => this.#onHint?.(JSON.parse(content)), { noAck: true })
      return { connection, channel, waiters }
    } catch (error) {
      this.#opening = undefined
      throw new CallError({ code: 'ERR_SHUTTING_DOWN', message: `The broker cannot be reached: ${error.message}`, retryable: true })
    }
  }
}
