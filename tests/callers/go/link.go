package main

import (
	"crypto/rand"
	"sync"

	amqp "github.com/rabbitmq/amqp091-go"
)

type answer struct {
	body []byte
	err  *CallError
}

// link is one connection, its channel and who waits on it; it is used up when it breaks.
type link struct {
	connection *amqp.Connection
	channel    *amqp.Channel
	mutex      sync.Mutex
	waiters    map[string]chan answer // by correlation id; a waiter takes one answer
}

func (l *link) answer(id string, a answer) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if waiter, waits := l.waiters[id]; waits {
		delete(l.waiters, id)
		waiter <- a
	}
}

func (r *Rack) connected() (*link, error) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.current != nil && !r.current.channel.IsClosed() {
		return r.current, nil
	}
	connection, err := amqp.Dial(r.URL)
	if err != nil {
		return nil, err
	}
	l := &link{connection: connection, waiters: map[string]chan answer{}}
	if err := l.prepare(r); err != nil {
		connection.Close()
		return nil, err
	}
	r.current = l
	return l, nil
}

func (l *link) prepare(r *Rack) (err error) {
	if l.channel, err = l.connection.Channel(); err == nil {
		err = l.channel.Confirm(false)
	}
	if err != nil {
		return err
	}
	var replies, hints <-chan amqp.Delivery
	if replies, err = l.channel.Consume("amq.rabbitmq.reply-to", "", true, false, false, false, nil); err != nil {
		return err
	}
	queue := "model-manager-" + r.Name + ".hints." + rand.Text()
	if _, err = l.channel.QueueDeclare(queue, false, true, true, false, nil); err != nil {
		return err
	}
	if err = l.channel.QueueBind(queue, "", "model-manager.hints", false, nil); err != nil {
		return err
	}
	if hints, err = l.channel.Consume(queue, "", true, true, false, false, nil); err != nil {
		return err
	}
	go func() {
		for hint := range hints {
			r.OnHint(hint.Body)
		}
	}()
	go l.listen(replies, l.channel.NotifyReturn(make(chan amqp.Return, 64)))
	return nil
}

// listen hands out what arrives; both channels close with the link, which ends every waiter.
func (l *link) listen(replies <-chan amqp.Delivery, returns <-chan amqp.Return) {
	go func() {
		for returned := range returns {
			l.answer(returned.CorrelationId, answer{err: &CallError{"ERR_NOT_FOUND", "No such rack on that broker.", false, nil}})
		}
	}()
	for reply := range replies {
		l.answer(reply.CorrelationId, answer{body: reply.Body})
	}
	l.connection.Close()
	l.mutex.Lock()
	defer l.mutex.Unlock()
	for _, waiter := range l.waiters {
		waiter <- answer{err: lost}
	}
	clear(l.waiters)
}
